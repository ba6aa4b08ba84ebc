"""Exported models: answers from ONNX Runtime or OpenVINO, where torch and timm need not be installed.

    lgvit_fast.export(model, "exported")            # where torch is: one ONNX graph a segment
    deployed = lgvit_fast.deploy.Deployed("exported")   # anywhere
    answers = deployed.predict(["cat.jpg", "dog.png"])

`exporter`, `executorch_file`, `int8_export`, `calibration_images` and `dense` are the side that needs
torch; nothing else here imports them.
"""

from lgvit_fast.deploy.deployed import Answers, Deployed

__all__ = ["Answers", "Deployed"]

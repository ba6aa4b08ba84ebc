"""An exported model on many processes and machines, with Ray. Needs the extra `scale`.

lgvit_fast.scale.predict("exported", "photos", "answers")       # image files to Parquet
ray.serve.run(lgvit_fast.scale.serve_deployment("exported"))    # a model behind HTTP
"""

from lgvit_fast.scale.offline import Predictor, predict
from lgvit_fast.scale.online import serve_deployment

__all__ = ["Predictor", "predict", "serve_deployment"]

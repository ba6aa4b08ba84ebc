"""ONNX Runtime and OpenVINO: a segment as an ONNX graph, and what runs such a graph.

`loaders` and `loop` need no torch. Exported models (`deploy`) and the engine (`inference`) rest on
this room.
"""

"""The same network written in ONNX operators."""

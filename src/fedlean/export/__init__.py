"""A trained model as a file for other programs: C, ONNX, PyTorch, safetensors (docs/export.md)."""

"""The dialect's ops as ONNX functions of the domain `tqc`, in standard operators, and graphs that call them."""

"""Write a GGUF file in another weight format: make_gguf.py FROM TO Q8_0|Q4_0|Q4_K_S (llama_model_quantize)."""

import ctypes
import sys

import llama_cpp

source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
params.allow_requantize = True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))

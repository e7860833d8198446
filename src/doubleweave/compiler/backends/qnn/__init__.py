"""Qualcomm's NPUs: quantized on real inputs, lowered to HTP context binaries.

Imports compiler.backends, compiler.quantize and vendors; knows nothing of other backends.
"""

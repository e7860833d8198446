"""Write a GGUF file as a Hugging Face folder: make_hugging_face.py FROM.gguf TO."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = Path(sys.argv[1]), sys.argv[2]
given = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).save_pretrained(target)
AutoTokenizer.from_pretrained(**given).save_pretrained(target)

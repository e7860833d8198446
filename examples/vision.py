"""A model that sees: its vision encoder and its language model in one program.

A tiny LLaVA with random weights is made here; a real one is a folder. The encoder's rows take the places that the
prompt keeps for the image, in the middle of its tokens. What comes out is held against transformers' own answer.

    python examples/vision.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import doubleweave as dw

IMAGE = 250  # the token that keeps a place for a row of the image
NEW_TOKENS = 24


class Vision(nn.Module):
    """One image, float32 [1, 3, 56, 56], to the rows that stand for it, float32 [16, hidden]."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.tower, self.projector = whole.model.vision_tower, whole.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        layers = self.tower(pixel_values, output_hidden_states=True).hidden_states
        # As LLaVA takes it: the last layer but one, without the row of the whole image.
        rows: Tensor = self.projector(layers[-2][:, 1:])
        return rows.flatten(0, 1)


def tiny_llava() -> Any:
    """A LLaVA of some 200 thousand random weights."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.15}
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, image_size=56, patch_size=14, **sizes)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, vocab_size=260, eos_token_id=2, **sizes
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def compile_both(whole: Any, folder: Path) -> dw.Program:
    """The language model from its folder, the encoder from the module: one program.pte."""
    whole.save_pretrained(folder / "llava")
    dw.compile_llm(
        folder / "llava",  # its text model is loaded from it
        folder / "program",
        quantize="none",
        max_context=256,
        encoders={"vision": dw.Encoder(Vision(whole), (torch.zeros(1, 3, 56, 56),))},
    )
    program = dw.open(folder / "program")
    assert isinstance(program, dw.Program)
    return program


def answer(program: dw.Program, prompt: list[int], image: Any) -> tuple[int, ...]:
    """New tokens behind a prompt with one image in it: rows in the place of its IMAGE tokens."""
    first, places = prompt.index(IMAGE), prompt.count(IMAGE)
    session = program.session()
    session.append(prompt[:first])
    session.append_embeddings(program.methods["vision"](image))
    return program.generate(prompt[first + places :], NEW_TOKENS, session=session).token_ids


def main() -> None:
    whole = tiny_llava()
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    prompt = [1, 17, 99, *[IMAGE] * 16, 5, 203, 44, 8]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ids = torch.tensor([prompt])
        wanted = whole.generate(ids, pixel_values=image, max_new_tokens=NEW_TOKENS, do_sample=False)
        found = answer(compile_both(whole, Path(folder)), prompt, image.numpy())
    print("transformers", *wanted[0, len(prompt) :].tolist())
    print("doubleweave ", *found)


if __name__ == "__main__":
    main()

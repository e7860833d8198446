"""The commands that make a program or say what works here: compile and doctor."""

from __future__ import annotations

import argparse
import time
from typing import Any

from doubleweave.cli.options import print_json, progress_bar
from doubleweave.errors import PolicyError


def add_compile(commands: Any) -> None:
    p = commands.add_parser(
        "compile",
        help="compile a model into a program folder",
        description="Compile SOURCE into the program folder DIR.",
        epilog="example: doubleweave compile smollm2 -o programs/smollm2",
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="an alias (smollm2), a .gguf file, a Hugging Face folder or a Llama checkpoint (.pt, .pth)",
    )
    p.add_argument(
        "-c", "--checkpoint", metavar="FILE", help="SOURCE, under the name that other tools give it"
    )
    p.add_argument(
        "-p", "--params", metavar="FILE", help="of a Llama checkpoint (default: params.json beside it)"
    )
    p.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="of a Llama checkpoint: a SentencePiece model or a tiktoken list (default: tokenizer.model beside it)",
    )
    p.add_argument("-o", "--out", metavar="DIR", required=True, help="the program folder to write")
    p.add_argument(
        "--backend",
        default="xnnpack",
        help="xnnpack (default; any CPU), qnn (Qualcomm's NPU, on x86 its emulator) or openvino (Intel's chips); see "
        "doubleweave doctor",
    )
    p.add_argument("--device", metavar="DEVICE", help="openvino: CPU (default), GPU or NPU")
    p.add_argument(
        "--soc", metavar="SOC", help="qnn: the chip to compile for: SM8550, SM8650, SM8750 or SM8850"
    )
    p.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="xnnpack: 8da8w (default; 8-bit weights), 8da4w (4-bit weights in groups of 32) or none (float32); "
        "qnn: 16a8w (default; 16-bit activations, 8-bit weights), 16a4w or 8a8w; openvino: 8w (default; 8-bit weights) "
        "or none",
    )
    p.add_argument(
        "--calibrate",
        metavar="FILE",
        help="qnn: the text, or JSON list of token ids, to find the scales with (default: a text of the package)",
    )
    p.add_argument(
        "--keep",
        action="append",
        type=_keep,
        default=[],
        metavar="PATTERN=RECIPE",
        help="qnn: another recipe for the segments of this name or pattern, or cpu; may be repeated",
    )
    p.add_argument(
        "--emulate",
        action="store_true",
        help="qnn: for the emulator on this machine, in which methods cannot share weights as they do on the chip",
    )
    p.add_argument(
        "--shape",
        help="bounded (default): linears take 1 to N rows; static: fixed sizes, as an NPU needs (default for qnn)",
    )
    p.add_argument(
        "--chunk",
        action="append",
        type=int,
        default=[],
        metavar="N",
        help="bounded: the most rows (default 128); static: a size, may be repeated (default 1, 32, 128)",
    )
    p.add_argument("--max-context", type=int, metavar="N", help="the longest context (default: the model's)")
    p.add_argument(
        "--attention",
        default="dynamic",
        help="dynamic (default; on the CPU, over a cache that grows) or static (inlined in the static segments, over a "
        "cache of --max-context tokens with a mask: the all-static way, to compare with)",
    )
    p.add_argument(
        "--attention-device",
        default="cpu",
        metavar="DEVICE",
        help="qnn: cpu (default), or npu to ask QNN for dynamic attention on the NPU",
    )
    p.add_argument("--json", action="store_true", help="print a summary as one JSON object on the last line")
    p.set_defaults(command=_compile)


def add_doctor(commands: Any) -> None:
    p = commands.add_parser(
        "doctor",
        help="say what works on this machine",
        description="Say which backends work on this machine, and what to install for the rest.",
    )
    p.add_argument("--json", action="store_true", help="print it as one JSON object on the last line")
    p.set_defaults(command=_doctor)


def _keep(text: str) -> tuple[str, str]:
    pattern, equals, recipe = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected PATTERN=RECIPE, such as 'block_*=16a8w'")
    return pattern, recipe


def _compile(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_program import compile_summary, quality_lines
    from doubleweave.compiler.compile_llm import compile_llm

    if (args.source is None) == (args.checkpoint is None):
        found = "neither SOURCE nor -c" if args.source is None else "both SOURCE and -c"
        raise PolicyError(f"source: found {found}, expected one of them")
    start = time.perf_counter()
    with progress_bar() as progress:
        manifest = compile_llm(
            args.checkpoint if args.source is None else args.source,
            args.out,
            backend=args.backend,
            quantize=args.quantize,
            shape=args.shape,
            chunk=args.chunk,
            max_context=args.max_context,
            attention=args.attention,
            attention_device=args.attention_device,
            soc=args.soc,
            device=args.device,
            calibrate=args.calibrate,
            keep=dict(args.keep),
            emulate=args.emulate,
            params=args.params,
            tokenizer=args.tokenizer,
            progress=progress,
        )
    summary = compile_summary(args.out, manifest, time.perf_counter() - start)
    print(
        f"{args.out}: {summary['segments']} segments, {summary['methods']} methods, "
        f"{summary['program_bytes'] / 2**20:.0f} MiB in {summary['seconds']:.0f} s, "
        f"at most {summary['peak_memory_bytes'] / 2**20:.0f} MiB of memory in a process"
    )
    for line in quality_lines(manifest):
        print(line)
    if not summary["tokenizer"]:
        print("note: the source has no tokenizer that can be read; give prompts as --token-ids")
    print_json(args, summary)


def _doctor(args: argparse.Namespace) -> None:
    from doubleweave.cli.doctor import examine, lines_of

    found = examine()
    for line in lines_of(found):
        print(line)
    print_json(args, found)

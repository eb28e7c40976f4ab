"""`openm6 import`, `openm6 export`: published decoders in, and the text path of a run out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from openm6.cli.group import print_result
from openm6.cli.train import Trained


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder of safetensors, GGUF file, or OWNER/NAME of the Hugging Face Hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new run.")],
    receipt: Annotated[bool, typer.Option(help="Compare logits with transformers, if it is installed.")] = True,
) -> None:
    """Import a published decoder: Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, OLMoE.

    \b
    Example: openm6 import Qwen/Qwen3-0.6B --out runs/qwen
    """
    # torch takes seconds to import
    from openm6.hub.importing import import_model as import_decoder

    print_result(import_decoder(source, out, receipt))


def export(
    trained: Trained,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[
        Literal["hf", "gguf"], typer.Option("--format", help="hf: safetensors for transformers; gguf: for llama.cpp.")
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or q8_0 for gguf; default: as stored, fp16 for gguf.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Export the text path of a model that does more than a plain decoder.")
    ] = False,
) -> None:
    """Export the text path of a run for other programs.

    \b
    Example: openm6 export runs/qwen --format gguf --dtype q8_0 --out qwen-gguf
    """
    # torch takes seconds to import
    from openm6.hub.export import export_run

    print_result(export_run(trained, out, form, dtype, text_only))

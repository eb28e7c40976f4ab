"""`openm6 demo`, `train`, and `convert`, `import`, `export`: training, and checkpoints and decoders in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from openm6.cli.group import print_result

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings to change.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the latest checkpoint of the run.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute; auto: a GPU if there is one.")
]
NumGpuLayers = Annotated[
    int | None, typer.Option(min=0, help="Layers that stay on the device; the others are offloaded.")
]
Dtype = Annotated[
    str, typer.Option(metavar="auto|fp32|bf16|int8", help="Weights of the model; auto: by device, see docs/serving.md.")
]
Trained = Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run or of one checkpoint.")]
Model = Annotated[str, typer.Argument(metavar="[MODEL]", help="Folder of a run or checkpoint, or name of a model.")]


def model_of(model: str) -> Path | str:
    """Return what is no plain name as a path: it is never looked for on the Hub."""
    return model if Path(model).name == model else Path(model)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    resume: Resume = False,
    device: Device = "auto",
) -> None:
    """Train and evaluate the demo model. It takes less than seven minutes on two cores, and ends with a report.

    \b
    Example: openm6 demo --out runs/demo
    """
    # torch takes seconds to import
    from openm6.train.run import train_recipe

    print_result(train_recipe("demo", [], resume, out, device))


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or name of a shipped recipe.")],
    overrides: Overrides = None,
    resume: Resume = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME of the recipe.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one GPU each if there are GPUs.")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts after a failed process.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a recipe.

    \b
    Example: openm6 train recipes/demo.yaml loop.steps=2000 --out runs/longer
    Several processes: openm6 train recipes/demo.yaml --nproc 2
    """
    if nproc > 1 or max_restarts:
        # torch takes seconds to import
        from openm6.distributed.launch import launch
        from openm6.train.loop import refuse_overwriting
        from openm6.train.run import run_folder

        # The processes would be refused, and a restart would resume the run that is there.
        refuse_overwriting(run_folder(recipe, out), resume)
        words = ["train", recipe, *(overrides or []), *(["--resume"] if resume else []), "--device", device]
        launch([*words, *(["--out", str(out)] if out else [])], nproc, max_restarts)
    else:
        # torch takes seconds to import
        from openm6.train.run import train_recipe

        print_result(train_recipe(recipe, overrides or [], resume, out, device))


def convert(
    trained: Trained,
    out: Annotated[Path, typer.Option(help="Folder of the new run.")],
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16-adafactor-momentum, bf16-adafactor or int8-adafactor (16, 4, 2, 1 bytes)."),
    ] = None,
    stage: Annotated[
        Literal["real", "pseudo"] | None, typer.Option(help="real: separate weights for each layer.")
    ] = None,
    moments: Annotated[
        Literal["independent", "aligned", "reset"],
        typer.Option(help="Optimizer moments of layers whose weights were shared."),
    ] = "independent",
) -> None:
    """Convert a checkpoint to another stage or another precision.

    \b
    Example: openm6 convert runs/demo --precision bf16-adafactor --out runs/demo-bf16
    """
    # torch takes seconds to import
    from openm6.train.convert import convert as convert_checkpoint

    typer.echo(convert_checkpoint(trained, out, precision, stage, moments))


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder of safetensors, GGUF file, or OWNER/NAME[@REVISION] of the Hugging Face Hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new run.")],
    receipt: Annotated[bool, typer.Option(help="Compare logits with transformers, if it is installed.")] = True,
    sha256: Annotated[str | None, typer.Option(help="Of a source that is one file; checked before it is read.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter of PEFT, or addition, for this model.")] = None,
    experts: Annotated[int | None, typer.Option(help="Copies of each dense network, as experts with a router.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts per token, 2 by default.")] = None,
    prototypes: Annotated[
        int | None, typer.Option(help="Groups of experts, one per token in each; no --top-k.")
    ] = None,
    noise: Annotated[float, typer.Option(help="Noise on the copies, in standard deviations of a matrix.")] = 0.0,
    reinit: Annotated[float, typer.Option(help="Fraction of the units of each copy that is drawn again.")] = 0.0,
    modalities: Annotated[
        str, typer.Option(help="Modalities whose tokens get experts of their own, as image,audio,numbers.")
    ] = "",
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Rank of updates of the attention for the tokens of --modalities.")
    ] = None,
) -> None:
    """Import a published decoder. It may be Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE or OLMoE.

    \b
    Example: openm6 import Qwen/Qwen3-0.6B --out runs/qwen
    """
    # torch takes seconds to import
    from openm6.core.config import build
    from openm6.hub.importing import Additions
    from openm6.hub.importing import import_model as import_decoder

    chosen: dict[str, object] = {"experts": experts, "top_k": top_k, "prototypes": prototypes, "noise": noise}
    chosen |= {"reinit": reinit, "modalities": [name for name in modalities.split(",") if name]}
    chosen |= {"lora_rank": lora_rank, "adapter": adapter}
    additions = build(Additions, chosen, "openm6 import")
    print_result(import_decoder(source, out, receipt, additions, sha256))


def export(
    trained: Trained,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[
        Literal["hf", "gguf", "peft", "addition"],
        typer.Option("--format", help="hf (transformers), gguf (llama.cpp), peft, or addition: all beside the base."),
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, q8_0 (gguf), int8 (addition); default: as stored, fp16, int8.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Export the text path of a model that does more than a plain decoder.")
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="For peft: all experts of a layer in one tensor, not one by one.")
    ] = False,
) -> None:
    """Export the text path of a run for other programs.

    \b
    Example: openm6 export runs/qwen --format gguf --dtype q8_0 --out qwen-gguf
    """
    # torch takes seconds to import
    from openm6.hub.export import export_run

    print_result(export_run(trained, out, form, dtype, text_only, fused))

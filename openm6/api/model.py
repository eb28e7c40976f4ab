"""A trained model in Python: `load`, and the class `OpenM6` with what it can be asked for."""

# Shapes: N inputs, E size of an embedding, H steps of a forecast, W and H pixels

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from openm6.api import values
from openm6.api.frames import LEVELS, as_table_error, forecast, predict
from openm6.checkpoint.folder import PREDICTORS_FILE, latest, read_state
from openm6.checkpoint.save import Snapshot, save
from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError, OutputError, first_line
from openm6.core.files import new_folder
from openm6.core.run_folder import RunFolder
from openm6.evaluate.report import card
from openm6.evaluate.results import EvalReport, read_account, run_facts
from openm6.hub.find import find_model
from openm6.hub.importing import Additions, import_model
from openm6.hub.pretrained import read_json
from openm6.inference.engine import RankedText, rank_texts, score_texts
from openm6.inference.engine import embed as embed_parts
from openm6.inference.load import LoadedModel, convert_weights, precision_of
from openm6.inference.load import load as load_checkpoint
from openm6.inference.question import (
    Answer,
    Box,
    Question,
    answer_parts,
    answer_questions,
    prompt_parts,
    stream_answer,
    stream_question,
)
from openm6.inference.sampling import Decoding
from openm6.kernels.probe import capabilities
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.modalities.simple_predictors import to_bytes
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    import pandas as pd


def load(
    name_or_path: str | Path,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
    num_gpu_layers: int | None = None,
    compiled: bool = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> OpenM6:
    """Load the model of a run's folder (its newest checkpoint), of a checkpoint's folder, a name, or of a Hub id.

    A name, such as "mini", is that of a folder in OPENM6_HOME/models or ~/.openm6/models, or of a shipped model.

    `device` is auto, cpu, cuda or cuda:N. `dtype` is auto (bfloat16 on a GPU that computes it, else float32), float32,
    bfloat16 or int8. With `num_gpu_layers` the other layers are offloaded to host memory. With `compiled`, layers
    are compiled for texts on a CPU: the first text takes a minute longer, once per size of model, others less time.

    The other arguments are for a Hub id, with the meaning that they have in huggingface_hub's `from_pretrained`.

    Raises:
        CheckpointError: there is no model, or it is damaged.
        ConfigError: no such device or dtype.

    >>> m6 = load(run)
    >>> m6
    OpenM6('...step-2')
    """
    precision = precision_of(str(dtype).removeprefix("torch."))
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
    hub |= {"local_files_only": local_files_only} | ({} if revision is None else {"revision": revision})
    path = find_model(name_or_path, hub)
    loaded = load_checkpoint(path, device, num_gpu_layers, precision=precision, compiled=compiled)
    where = loaded.omni.device
    if str(dtype) == "auto" and where.type == "cuda" and capabilities(where).bf16:
        convert_weights(loaded.omni, "bfloat16")
    return OpenM6(loaded)


def from_hf(
    source: str | Path, out: str | Path | None = None, device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto", *, experts: int | None = None, top_k: int | None = None,
    prototypes: int | None = None, noise: float = 0.0, reinit: float = 0.0, modalities: Sequence[str] = (),
    lora_rank: int | None = None, adapter: str | Path | None = None, sha256: str | None = None,
) -> OpenM6:  # fmt: skip
    """Import a published decoder, as `openm6 import` does, and load it; `out` keeps the run in a folder.

    `source` is a folder of safetensors, a GGUF file, whose `sha256` is checked if given, or OWNER/NAME[@REVISION] of
    the Hub. `device` and `dtype` are as for `load`.

    Each dense network is copied into `experts`, of which a token goes through `top_k` (2), or in place of that through
    one in each of `prototypes` groups; `noise` on the copies is in standard deviations of their matrices, and
    `reinit` is the fraction of their units that is drawn again. Tokens of `modalities` (image, audio, numbers) get
    experts of their own and, with `lora_rank`, updates of the attention. `adapter` is a folder of PEFT or an addition.

    Raises:
        CheckpointError: the source is not there, not whole or another file, or the adapter does not fit it.
        ConfigError: an architecture or option that is not supported, or a package that is not installed.

    >>> from_hf("Qwen/Qwen3-0.6B", "runs/sparse", experts=8, top_k=2, modalities=["image"])  # doctest: +SKIP
    """
    chosen: dict[str, Any] = {"experts": experts, "top_k": top_k, "prototypes": prototypes, "noise": noise}
    chosen |= {"reinit": reinit, "modalities": modalities, "lora_rank": lora_rank, "adapter": adapter}
    additions = build(Additions, chosen, "openm6.from_hf")
    with tempfile.TemporaryDirectory(prefix="openm6-") as folder:
        run = Path(folder, "run") if out is None else Path(out)
        import_model(str(source), run, False, additions, sha256)
        return load(run, device, dtype)


class OpenM6:
    """A model in memory; made by `openm6.load`. Images and audio clips are given as paths, bytes of files, Pillow
    images, arrays or `Audio`; a list of inputs is answered as one batch, with a list.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def __repr__(self) -> str:
        return f"OpenM6({str(self.loaded.checkpoint)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """What `save_pretrained` writes as bytes, and the device, unless another machine may lack it."""
        with tempfile.TemporaryDirectory(prefix="openm6-") as temporary:
            self._write(folder := Path(temporary, "model"))
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return {"files": files, "device": "cpu" if self.loaded.omni.device.type == "cpu" else "auto"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="openm6-") as folder:
            for name, content in state["files"].items():
                Path(folder, name).write_bytes(content)
            self.loaded = load(folder, state["device"]).loaded

    from_pretrained = staticmethod(load)

    def save_pretrained(self, folder: str | Path, license: str | None = None) -> None:
        """Write the weights in memory, tokenizer and model card to a new folder, which `openm6.load` reads.

        Low-rank adapters are merged. `license` is an identifier of the Hub, such as "apache-2.0".

        Raises:
            ConfigError: the folder is not empty, weights are in int8 or offloaded, or an encoder or a codec is of this
                machine alone.
            OutputError, CheckpointError: it cannot be written; nothing is left of it.

        >>> m6.save_pretrained("published")
        >>> OpenM6.from_pretrained("published")
        OpenM6('published')
        """
        self.loaded.description.refuse_local()
        self._write(Path(folder), license)

    def _write(self, folder: Path, license: str | None = None) -> None:
        omni, description = self.loaded.omni, self.loaded.description.to_publish()
        if omni.text.int8_head is not None or omni.backbone.executor.offloaded:
            raise ConfigError("weights in int8 or offloaded are not saved: load the model in fp32 or bf16, as a whole")
        tokenizer = self.loaded.text.tokenizer.to_str()
        files: dict[str, str | bytes] = {MODEL_FILE: description.to_json(), TOKENIZER_FILE: tokenizer}
        files |= {PREDICTORS_FILE: to_bytes(found)} if (found := self.loaded.numbers.predictors) else {}
        state = {"stage": description.backbone.stage, "precision": "fp32", "optimizer": "adamw"}
        text = _card(self.loaded, folder.name)
        if license is not None:
            text = re.sub("^license: .*$", lambda _: f"license: {license}", text, count=1, flags=re.MULTILINE)
        with new_folder(folder) as partial:
            saved = save(Snapshot(0, omni, {}, state, files=files), partial, keep=1)
            # The state does not list it, so that it may be edited.
            (saved / "README.md").write_text(text, encoding="utf-8", newline="\n")
            for path in saved.iterdir():
                path.rename(partial / path.name)
            saved.rmdir()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload model",
        license: str | None = None, token: str | bool | None = None, branch: str | None = None, create_pr: bool = False,
    ) -> str:  # fmt: skip
        """Upload what `save_pretrained` writes to a repository of the Hugging Face Hub; return its address.

        Repository and branch are made if there are none, by the user of `token`, else of `hf auth login` or HF_TOKEN.
        With `create_pr` the upload is a pull request to the branch, whose address is returned.

        Raises:
            ConfigError: as `save_pretrained`, or huggingface_hub is not installed.
            OutputError: there is no network, or no right to write there.

        >>> m6.push_to_hub("someone/model", private=True)  # doctest: +SKIP
        """
        try:
            # An optional dependency.
            from huggingface_hub import HfApi  # noqa: PLC0415
        except ModuleNotFoundError:
            raise ConfigError("publishing needs an optional package: pip install huggingface_hub") from None
        with tempfile.TemporaryDirectory(prefix="openm6-") as temporary:
            self.save_pretrained(folder := Path(temporary, Path(repo_id).name), license)
            api = HfApi(token=token)
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                if branch is not None and not create_pr:
                    api.create_branch(url.repo_id, branch=branch, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=url.repo_id, folder_path=folder, commit_message=commit_message, revision=branch,
                    create_pr=create_pr, delete_patterns=["*.safetensors"],
                )  # fmt: skip
            # The library raises errors of its own, of its HTTP client and of the system.
            except Exception as error:
                reason = f"({first_line(error)}): log in with hf auth login, check name and network"
                raise OutputError(f"{repo_id} could not be published {reason}") from None
        return str(commit.pr_url or url)

    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        audio: Any = None,
        numbers: Any = None,
        series: Any = None,
        output: str = "text",
        target: str | None = None,
        prediction_length: int = 8,
        mask_box: Box | None = None,
        mask_span: tuple[float, float] | None = None,
        language: str = "en",
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        stream: bool = False,
    ) -> Any:
        """Return a str, an image (PIL), an `Audio` or a `Distribution`, as `output` asks: text, image, audio, numbers.

        `numbers` maps columns to values; `target` names the one to predict, or its value is None. `series` maps a name
        to values in time, of which the next `prediction_length` are forecast. `mask_box` (left, top, right, bottom)
        and `mask_span` (start, end), as fractions, are what is generated of an image or clip. With `stream`, text
        comes as an iterator of its parts. Answer i of a list draws from seed + i.

        Raises:
            ConfigError, DataError: the inputs do not fit together, or one cannot be read.

        >>> m6.generate("draw the digit seven", output="image", num_inference_steps=2).size
        (64, 64)
        >>> len(m6.generate(image=["seven.png", "seven.png"], max_new_tokens=4))
        2
        """
        given = {"prompt": prompt, "image": image, "audio": audio, "numbers": numbers, "series": series}
        asked: Any = {"output": output, "column": target, "ahead": prediction_length, "language": language}
        asked |= {"mask_box": mask_box, "mask_span": mask_span}
        questions = [Question(**asked, **_inputs(row)) for row in _rows(given)]
        text = {"max_tokens": max_new_tokens, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        masked = {"steps": num_inference_steps, "guidance": guidance_scale}
        settings = _decoding(text, masked, {"temperature": temperature, "seed": seed})
        is_batch = any(isinstance(value, list) for value in given.values())
        if stream:
            _check_stream(output, is_batch)
            return stream_question(self.loaded, questions[0], settings.text)
        answers = self.answer(questions, settings)
        return answers if is_batch else answers[0]

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> list[Any]:
        """Return the answers to questions that ask for one modality, as `generate` does."""
        if not questions:
            return []
        answers = answer_questions(self.loaded, questions, decoding)
        return [_output(answer, question) for answer, question in zip(answers, questions, strict=True)]

    def chat(
        self,
        messages: Sequence[Any],
        output: str = "text",
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        stream: bool = False,
    ) -> Any:
        """Return the answer to a chat; a list of chats is answered as one batch. Settings are those of `generate`.

        A message has a `role` and a `content`: a text, or a list of parts of type text, image, audio (with `path`, or
        `image` or `audio` as an object), image_url or input_audio (as in OpenAI's API, without fetching), or numbers.

        Raises:
            ConfigError, DataError: an output or setting does not exist, or a part cannot be read.

        >>> image, words = {"type": "image", "path": "seven.png"}, {"type": "text", "text": "What is this?"}
        >>> isinstance(m6.chat([{"role": "user", "content": [image, words]}], max_new_tokens=4), str)
        True
        """
        if output not in ("text", "image", "audio"):
            raise ConfigError(f"a chat answers with text, image or audio, not {output!r}: numbers come from generate")
        is_batch = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], list)
        chats = messages if is_batch else [messages]
        prompts = [values.parts_of_messages(chat, self.loaded) for chat in chats]
        text = {"max_tokens": max_new_tokens, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        masked = {"steps": num_inference_steps, "guidance": guidance_scale}
        settings = _decoding(text, masked, {"temperature": temperature, "seed": seed})
        if stream:
            _check_stream(output, is_batch)
            return stream_answer(self.loaded, prompts[0], settings.text)
        codec = self.loaded.image if output == "image" else self.loaded.audio
        targets = [] if output == "text" else [codec.blank() for _ in prompts]
        found = [_output(one) for one in answer_parts(self.loaded, prompts, output, targets, settings)]
        return found if is_batch else found[0]

    def embed(
        self, text: str | list[str] | None = None, *, image: Any = None, audio: Any = None, numbers: Any = None
    ) -> np.ndarray:
        """Return the embedding, of length 1, of a text, image, audio clip, numbers, or several together.  # E, or N E

        Scalar products are similarities. A list of inputs gives one row per input.

        Raises:
            ConfigError: the model was not trained to embed, or nothing is given.
            DataError: an input cannot be read.

        >>> embedder.embed(["a red apple", "a green pear"]).shape
        (2, 16)
        """
        given = {"prompt": text, "image": image, "audio": audio, "numbers": numbers}
        found = embed_parts(self.loaded, [self._input_parts(row) for row in _rows(given)])
        return found if any(isinstance(value, list) for value in given.values()) else found[0]

    def rank(
        self, query: str | None, candidates: Sequence[str], *, image: Any = None, audio: Any = None,
        numbers: Any = None, normalize: bool = True,
    ) -> list[RankedText]:  # fmt: skip
        """Return the candidates as (index, candidate, log_likelihood, score), the likeliest after the query first.

        The score is the log-likelihood in nats, per token if `normalize`.

        Raises:
            ConfigError, DataError: nothing is given, or it cannot be read.

        >>> best, worst = m6.rank("draw the digit", ["seven", "one"])
        >>> best.score >= worst.score
        True
        """
        listed = isinstance(candidates, Iterable) and not isinstance(candidates, str)
        candidates = list(candidates) if listed else []
        if not candidates or not all(isinstance(one, str) for one in candidates):
            raise ConfigError("candidates must be a list of at least one text")
        parts = self._input_parts({"prompt": query, "image": image, "audio": audio, "numbers": numbers})
        targets = [self.loaded.text.candidate(text) for text in candidates]
        (nll,) = score_texts(self.loaded, [source_segments(parts, self.loaded.modalities)], targets)
        found = self.loaded.numbers.ranking(nll, candidates, list(map(len, targets)), parts)
        return rank_texts(candidates, [one for one, _ in found], [length for _, length in found], normalize)

    def predict(
        self,
        df: pd.DataFrame,
        target: str,
        quantile_levels: Sequence[float] = LEVELS,
        classes: Sequence[Any] | None = None,
    ) -> pd.DataFrame:
        """Return predictions of a column for each row, by the other columns that the model was trained on.

        The result has the index of `df`. `predictions` is the median of a number, with a column per quantile level,
        named by it. Of a category it is the likeliest of `classes`, with a column of probabilities per class; without
        `classes` the likeliest of the training if it has simple predictors, or the text that the model writes. NaN or
        None stands where a row lacks what the task needs. Cells of images and audio are paths or bytes of files.

        Raises:
            DataError: the model does not predict this column, one is missing or of several types, or a cell is broken.
            ConfigError: a quantile level outside 0 and 1.

        >>> m6.predict(penguins, target="body_mass_g", quantile_levels=[0.1, 0.9]).columns.tolist()
        ['predictions', '0.1', '0.9']
        """
        return predict(self.loaded, df, target, quantile_levels, classes)

    def forecast(
        self,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None = None,
        id_column: str = "item_id",
        timestamp_column: str = "timestamp",
        target: str | list[str] = "target",
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] = LEVELS,
        batch_size: int = 256,
        context_length: int | None = None,
        cross_learning: bool = False,
        validate_inputs: bool = True,
        freq: str | None = None,
    ) -> pd.DataFrame:
        """Return forecasts of the series in a long DataFrame, with arguments and result of Chronos' `predict_df`.

        The result has `prediction_length` rows per item and target: the columns of items and times, `target_name`,
        `predictions` (the median), and a column per quantile level, named by it. `future_df` holds the covariates that
        are known of the steps ahead. The defaults of length and context are those of the training. `batch_size` series
        are forecast at a time. `validate_inputs=False` leaves out the checks of `future_df`.

        Raises:
            DataError (as a ValueError): the model does not forecast this column, one is missing, times are repeated or
                irregular, or a series has no value.
            ConfigError: a number is out of range, or cross_learning, which no model of ours has.

        >>> m6.forecast(weather, target="temp_max", prediction_length=4).columns[:4].tolist()
        ['item_id', 'timestamp', 'target_name', 'predictions']
        """
        if cross_learning:
            raise ConfigError("cross_learning=True is not supported, since each series is forecast alone: leave it out")
        alone = isinstance(target, str) or not isinstance(target, Iterable)  # a name may be a number
        targets = list(map(str, [target] if alone else target))
        names = (id_column, timestamp_column)
        with as_table_error():
            return forecast(
                self.loaded, df, future_df, names, targets, prediction_length, quantile_levels, batch_size,
                context_length, validate_inputs, freq,
            )  # fmt: skip

    def _input_parts(self, row: dict[str, Any]) -> list[Part]:
        """The parts of inputs without the words of any task."""
        question = Question(output="text", **_inputs(row | {"prompt": row["prompt"] or ""}))
        return [part for part in prompt_parts(question, self.loaded, chat=False) if part.raw not in ("", " ")]


def _card(loaded: LoadedModel, name: str) -> str:
    """The card beside the weights, or of the run that evaluated them, or else a new one without results."""
    checkpoint, energy = loaded.checkpoint.resolve(), None
    state, run = read_state(checkpoint) if checkpoint.exists() else {}, RunFolder(checkpoint.parent.parent)
    evaluated = read_json(run.path / "report.json").get("steps", -1) == state.get("step")
    kept = (run.path if evaluated else checkpoint) / "README.md"
    if kept.is_file() and "library_name: openm6" in (text := kept.read_text(encoding="utf-8")):
        return text
    with suppress(CheckpointError):
        energy = read_account(run) if latest(run.path) == checkpoint else None
    return card(EvalReport([], 0.0, str(checkpoint)), run_facts(name, loaded.omni, loaded.description, state, energy))


def _decoding(text: dict[str, Any], masked: dict[str, Any], both: dict[str, Any]) -> Decoding:
    """Decoding settings, without those that are None; ConfigError if one is out of range."""
    given = {"text": text | both, "masked": masked | both}
    set_ones = {name: {key: one for key, one in part.items() if one is not None} for name, part in given.items()}
    return build(Decoding, set_ones, "decoding")


def _rows(given: dict[str, Any]) -> list[dict[str, Any]]:
    """One mapping per input of a batch, lists taken apart, all else repeated; ConfigError if lists differ in length."""
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ConfigError(f"lists must be of one length, and there are {listed}")
    count = next(iter(lengths.values()), 1)
    return [{name: value[row] if name in lengths else value for name, value in given.items()} for row in range(count)]


def _inputs(row: dict[str, Any]) -> dict[str, Any]:
    media = {name: values.media_bytes(row[name], name) for name in ("image", "audio")}
    series = values.number_series(row.get("series"))
    return {"text": row["prompt"], "numbers": row["numbers"], "series": series, **media}


def _check_stream(output: str, is_batch: bool) -> None:
    if output != "text" or is_batch:
        raise ConfigError("stream=True is for one answer in text: ask for output='text', and give no list")


def _output(answer: Answer, question: Question | None = None) -> Any:
    if isinstance(answer, np.ndarray):
        return values.Audio(answer)
    if isinstance(answer, str) or question is None or question.output != "numbers":
        return answer
    name = question.target_column() if question.series is None else question.series.name
    return values.Distribution(name, answer, is_series=question.series is not None)  # type: ignore[arg-type]

"""Multimodal training: one model, many tasks over many sources, packed rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import PREDICTORS_FILE, latest, list_checkpoints, read_state
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.data.mixture import epochs_seen
from openm6.data.packing import Packer, merge_cursors
from openm6.data.quarantine import summary as summary_of_records
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.distributed.collectives import open_gather
from openm6.distributed.process_group import ProcessGroupContext
from openm6.energy.meter import open_meter
from openm6.evaluate import results
from openm6.evaluate.report import result_line, write_report
from openm6.evaluate.run import evaluate
from openm6.inference.load import LoadedModel, load, read_texts
from openm6.modalities.batch import Batch, Counts, count, split
from openm6.modalities.numbers import Numbers
from openm6.modalities.pool import POOL
from openm6.modalities.registry import MODALITIES, load_networks
from openm6.modalities.regression import FittedRidges
from openm6.modalities.series import SeriesStats
from openm6.modalities.simple_predictors import from_bytes
from openm6.modalities.text import Text
from openm6.models.backbone import Backbone, side_loss
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, CheckpointConfig, build_model
from openm6.models.presets import build_backbone
from openm6.nn.moe import TokenDispatcher
from openm6.tasks.registry import any_masks_words
from openm6.train import multimodal_data as data
from openm6.train.alignment import align
from openm6.train.calibration import EARLY_EXAMPLES, MAX_EXAMPLES, calibration_examples, first_widths, fit_widths
from openm6.train.metering import Attribution, gpus_of
from openm6.train.recipe import MultimodalRecipe, check_mesh
from openm6.train.start import START_FILE, Start, freeze, open_start
from openm6.train.step import seed_everything
from openm6.train.training_task import StepResult, TrainingTask

PART_TOKENS = 256  # fewer are not worth a worker, because each part costs some milliseconds whatever it holds


class MultimodalTraining(TrainingTask):
    """Build modalities and model from a recipe and train them on its mixture."""

    packer: Packer
    description: CheckpointConfig
    after_step_needs_loads_alone = True

    def __init__(
        self, recipe: MultimodalRecipe, run: RunFolder, device: torch.device, ranks: ProcessGroupContext | None = None
    ) -> None:
        self.recipe, self.run = recipe, run
        self.ranks = ranks or ProcessGroupContext()
        if self.ranks.size > 1:  # first, as its checks need no data
            config = build_backbone(recipe.model)
            num_experts = config.experts.num_experts if config.experts else None
            mesh = recipe.parallel.resolve(self.ranks.size, num_experts, device.type == "cuda")
            check_mesh(recipe, mesh, config)
        load_networks(recipe.modalities)  # raises before anything is fitted
        sources = open_sources(recipe.sources, "train")
        used = {component.source: sources[component.source] for component in recipe.mixture}
        start = open_start(recipe, run)
        ridges = self._fit(used, start)
        seed_everything(recipe.loop.seed, "weights")
        empty = recipe.loop.offloaded or (start is not None and start.checkpoint is not None)
        predictors = from_bytes(self.predictors, PREDICTORS_FILE) if self.predictors else ()
        self.omni, self.modalities = build_model(self.description, self.tokenizer, "the tokenizer", empty, predictors)
        trained = (one.task for one in self.description.trained_tasks)
        cast(Text, self.modalities["text"]).reads_gaps = any_masks_words(trained, self.description.tasks)
        self.description = self.description.model_copy(update={"external": self.modalities.external})
        self.numbers = cast(Numbers, self.modalities["numbers"])
        self.numbers.ridges = ridges  # with those of folds, for training windows
        self.model = self.omni
        self.stem_elements = recipe.modalities.image.stem_elements
        if start is not None:
            self.start_weights = start.load_weights(self.omni, recipe.modalities, recipe.loop.offloaded)
            tasks = [recipe.task(component.task) for component in recipe.mixture]
            targets = {task.target.modality for task in tasks}
            inputs = {slot.modality for task in tasks for slot in task.inputs.values()}
            inputs |= set(MODALITIES) if any(task.chat for task in tasks) else set()
            freeze(self.omni, recipe.model.freeze, {"text", POOL, *targets, *inputs})
            start.check_replaced(self.omni, recipe.modalities, targets, inputs)
            self._align(start, sources)
        for tensor in (*self.omni.parameters(), *self.omni.buffers()):  # in place; tensors on `meta` stay there
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
        if self.ranks.size > 1:
            if recipe.loop.offloaded:
                self.ranks.open_mesh(mesh)  # the store shards the weights
            else:
                self.ranks.shard(self.omni, mesh)
            self.omni.backbone.executor.dispatcher = self.ranks.token_dispatcher(recipe.parallel.ep_overlap_chunks)
        if self.omni.pool is not None:
            self.omni.pool.gather = open_gather()
        self.attribution = Attribution(self.omni, {component.task for component in recipe.mixture})
        data.check_sources(recipe, sources)
        # Before the training, so that wrong validation records do not end it at its first checkpoint.
        calibrated = self.ranks.size == 1 and not recipe.loop.offloaded
        self.calibration = calibration_examples(recipe, self.modalities) if calibrated else None
        if self.ranks.is_main_process and not list_checkpoints(run.checkpoints):
            run.quarantine.unlink(missing_ok=True)  # of a run that never began
        self.packer = data.open_packer(recipe, sources, self.modalities, self.ranks, run.quarantine)
        # Pooled tokens are compared with all others of their batch: those of another process would be missed.
        whole = recipe.contrastive or self.ranks.size > 1
        self.max_parts = 1 if whole else max(1, self.tokens_per_step // PART_TOKENS)

    def _align(self, start: Start, sources: dict[str, Source]) -> None:
        """Fit the projections of encoders that the start lacks to its words, on every rank alike."""
        chosen, began = self.recipe.modalities, time.monotonic()
        new = {*start.unlike(chosen), *start.with_new_encoder(chosen)}
        kinds = [f"{name}_in" for name in sorted(new) if getattr(chosen, name).encoder is not None]
        if start.checkpoint is not None and kinds:
            packer = data.open_packer(self.recipe, sources, self.modalities, ProcessGroupContext(), None)
            align(self.omni, cast(Text, self.modalities["text"]), kinds, packer.batches())
            self.seconds_before += self.ranks.broadcast_object(time.monotonic() - began)

    def _fit(self, sources: dict[str, Source], start: Start | None) -> dict[str, FittedRidges]:
        """Set tokenizer, simple predictors and description, by the sources and the start; return ridges of series."""
        recipe, run, before = self.recipe, self.run, start.description if start is not None else None
        # The start holds what was fitted to the sources that it names.
        known = [name for name in sources if before is not None and name in before.sources]
        new = {name: source for name, source in sources.items() if name not in known}
        text, fitted, spent = "", b"", 0.0
        with self.ranks.main_process_first():  # simple predictors may take longer than a collective operation waits
            if self.ranks.is_main_process:
                text = data.tokenizer_text(recipe, sources, run) if start is None else start.tokenizer
                began = time.monotonic()
                fitted = data.table_predictors(recipe, sources, run, [] if start is None else start.predictors)
                spent = time.monotonic() - began
        self.tokenizer, self.predictors, self.seconds_before = self.ranks.broadcast_object((text, fitted, spent))
        series = data.fit_all_series(sources.values()) | ({} if before is None else before.series)
        ridges = data.fit_all_ridges(new.values(), series)
        if before is not None:
            ridges |= {name: FittedRidges.of_texts(texts) for name, texts in before.ridges.items()}
            # Again, as training needs those of folds.
            ridges |= data.fit_all_ridges((sources[name] for name in known), series)
        self.description = self._describe(sources, series, ridges)
        if start is not None:
            self.description = start.merge(self.description)
            if self.ranks.is_main_process:
                replace_text(run.path / START_FILE, start.description.to_json())
        if begun := list_checkpoints(run.checkpoints):
            external = read_texts(begun[-1])[0].external
            self.description = self.description.model_copy(update={"external": external})
        return ridges

    def _describe(
        self, sources: dict[str, Source], series: dict[str, SeriesStats], ridges: dict[str, FittedRidges]
    ) -> CheckpointConfig:
        recipe = self.recipe
        text = recipe.modalities.text.model_copy(update={"vocab_size": recipe.vocabulary})
        used = dict.fromkeys(component.task for component in recipe.mixture if component.task in recipe.tasks)
        return CheckpointConfig(
            preset=recipe.model.preset,
            backbone=build_backbone(recipe.model),
            modalities=recipe.modalities.model_copy(update={"text": text}),
            scales=data.fit_scales(sources.values()),
            series=series,
            ridges={name: fitted.to_texts() for name, fitted in ridges.items()},
            widths=first_widths(sources.values()),
            embedding=recipe.pooling,
            trained_tasks=data.trained_tasks(recipe, sources),
            tasks={name: recipe.tasks[name].model_dump(mode="json") for name in used},
            sources={name: source.model_dump(mode="json") for name, source in recipe.sources.items()},
            eval=recipe.eval.model_dump(mode="json"),
        )

    def batches(self) -> Iterator[Batch]:
        return self.packer.batches()

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        return split(batch, parts)

    def restore(self, cursor: dict[str, Any]) -> None:
        self.packer.restore(cursor)

    def merge_cursors(self, cursors: list[dict[str, Any]]) -> dict[str, Any]:
        return merge_cursors(cursors)

    def loss(self, batch: Batch) -> StepResult:
        """Return the mean over examples of means over learned tokens, plus side losses; of ranks each a fraction."""
        counts, work = self._count(batch), self.attribution.work(batch)
        batch = batch.to(self.omni.device)
        losses, loads = self.omni.compute_loss(batch)
        zero = torch.zeros((), device=self.omni.device)
        total = sum((part.total for part in losses.values()), start=zero)
        if self.omni.pool is not None and POOL not in losses:
            total = total + self.omni.pool.none()
        nll = {kind: part.nll.detach().sum() for kind, part in losses.items()}
        metrics: dict[str, float | Tensor] = {
            f"loss/{kind}": nll.get(kind, zero) / count for kind, count in counts.learned.items() if count
        }
        metrics["packing_efficiency"] = batch.tokens / counts.positions
        fraction = batch.tokens / max(1.0, counts.tokens)  # the routers' own means are over this rank's tokens
        loads = [replace(load, dropped=load.dropped * fraction) for load in loads]
        loss = total / counts.examples + fraction * side_loss(loads)
        # In a sharded model every rank needs a gradient for each weight, whichever its rows use, or others wait for it
        # for ever. Sums of no numbers have a gradient of zero; 0 times a weight that is not finite would be NaN.
        loss = loss + sum((weight.reshape(-1)[:0].sum() for weight in self.optional_parameters()), start=0.0)
        return StepResult(loss, metrics, loads, work)

    def held_out_batches(self, count: int, choosing: bool = False) -> list[Batch]:
        return data.pack_held_out(self.recipe, self.modalities, self.ranks, count, choosing)

    def held_out_loss(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return the training loss without side losses, and means over tokens by kind, over examples by task."""
        kinds, tasks = list(self.omni.adapters), sorted({component.task for component in self.recipe.mixture})
        nll, learned = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)
        sums, posed = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)
        total, examples = 0.0, 0
        for batch in batches:
            losses, _ = self.omni.compute_loss(batch.to(self.omni.device), as_trained=True)
            if self.omni.pool is not None and POOL not in losses:
                self.omni.pool.none()  # other ranks may have pairs, and gather
            for kind, part in losses.items():
                nll[kind] += float(part.nll.sum())
                learned[kind] += len(part.nll)
                total += float(part.total)
                loss = (part.nll * part.weight).tolist()
                for example, value in zip(part.example.tolist(), loss, strict=True):
                    sums[batch.tasks[example]] += value
            examples += batch.num_examples
            for task in batch.tasks:
                posed[task] += 1
        numbers = [total, examples, *nll.values(), *sums.values(), *learned.values(), *posed.values()]
        total, count, *rest = self.ranks.all_reduce(numbers)
        means = zip([*kinds, *tasks], rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True)
        return {"loss": total / max(1.0, count), **{name: one / n for name, one, n in means if n}}

    def optional_parameters(self) -> list[nn.Parameter]:
        return list(self.omni.adapters.parameters()) if self.ranks.wrapped else []

    def _count(self, batch: Batch) -> Counts:
        """Return the counts of the whole batch of which this is a part, or of the batches of all ranks."""
        own = batch.whole or count(batch)
        kinds = list(self.omni.adapters)
        learned = [own.learned.get(kind, 0) for kind in kinds]
        examples, tokens, positions, *rest = self.ranks.all_reduce([own.examples, own.tokens, own.positions, *learned])
        return Counts(max(1.0, examples), tokens, positions, dict(zip(kinds, rest, strict=True)))

    def after_step(self, result: StepResult) -> None:
        self.omni.backbone.update_balance(list(result.loads))

    @property
    def backbone(self) -> Backbone:
        return self.omni.backbone

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.packing.rows * self.recipe.packing.seq_len

    def delink(self) -> dict[str, str]:
        """Copy the weights for each layer; a sharded model is built again, sharded as it was, one block at a time."""
        if self.ranks.wrapped:
            # torch's distributed tensors take seconds to import: a process alone is spared them.
            from openm6.distributed.fsdp import gather_parameters, refill_unit, shard_rest  # noqa: PLC0415

            old, layout = self.omni, self.ranks.layout
            with torch.no_grad():
                gather_parameters([old.adapters, old.backbone.layers, old.backbone.final_norm])
                names = old.delink(lambda fresh, module: refill_unit(layout, fresh, module))
                self.omni = self.model = old.unwrapped()
                shard_rest(self.omni, layout)
        else:
            names = self.omni.delink()
        self.description = self.description.model_copy(update={"backbone": self.omni.config})
        return names

    def finish(self, run: RunFolder) -> None:
        """Evaluate on the test records; write report.html, report.json and the model card, while other ranks wait."""
        at_end = self.recipe.eval.at_end
        if not self.ranks.is_main_process:
            return
        state = read_state(latest(run.path))
        seen = epochs_seen(state["progress"]["cursor"]["mixture"])
        listed = ", ".join(f"{name} {epochs:.3g}" for name, epochs in seen.items())
        get_log().info(f"epochs of each source and task: {listed}")
        if not (at_end if at_end != "auto" else not self.recipe.loop.offloaded):
            offloaded = " --num-gpu-layers 0" if self.recipe.loop.offloaded else ""
            get_log().info(f"not evaluated, as eval.at_end is false; openm6 evaluate {run.path}{offloaded} does it")
            return
        checkpoint, reported = results.last_checkpoint(run)
        if reported:
            get_log().info(f"{run.path} is trained, evaluated and reported: nothing is left to do")
            return
        kept = results.load_evaluation(run, str(checkpoint))
        report, joules = kept or self._evaluate(run, checkpoint)
        if kept is None:
            results.save_evaluation(run, report, joules)
        set_aside = summary_of_records(state["progress"]["cursor"]["quarantine"])
        if set_aside:
            get_log().info(f"{set_aside}; see {run.quarantine}" if run.quarantine.is_file() else set_aside)
        energy = results.read_account(run, evaluation=joules)
        write_report(run, report, results.run_facts(run.name, self.omni, self.description, state, energy))
        get_log().info(f"wrote {run.path / 'report.html'}")
        results.drop_evaluation(run)

    def _evaluate(self, run: RunFolder, checkpoint: Path) -> tuple[results.EvalReport, float]:
        watts = self.recipe.loop.energy.cpu_watts
        # A process that is part of a group is not forked.
        settings = ["eval.num_processes=1"] if self.ranks.layout is not None else None
        with open_meter(gpus_of(self.omni.device), watts) as meter, meter.span() as span:
            report = evaluate(
                run.path,
                settings=settings,
                on_result=lambda result: get_log().info(result_line(result)),
                loaded=self._loaded(checkpoint),
            )
        return report, span.joules

    def _loaded(self, checkpoint: Path) -> LoadedModel:
        """Return the model in memory or, if sharded or offloaded, the checkpoint, layer by layer: two might not fit."""
        if self.ranks.layout is not None or self.recipe.loop.offloaded:
            return load(checkpoint, self.omni.device, num_gpu_layers=0, host_copy=False)
        omni = self.omni.eval()
        omni.backbone.merge_lora()
        if omni.pool is not None:
            omni.pool.gather = None
        omni.backbone.executor.dispatcher = TokenDispatcher()
        # A run that was resumed after its last step has fitted none itself.
        self.numbers.widths = widths = read_texts(checkpoint)[0].widths
        description = self.description.model_copy(update={"widths": widths})
        return LoadedModel(omni.requires_grad_(False), self.modalities, description, checkpoint)

    def files(self, last: bool = True) -> dict[str, str | bytes]:
        if self.calibration is not None:
            self.numbers.widths = {}
            loaded = LoadedModel(self.omni, self.modalities, self.description, self.run.path)
            widths = fit_widths(loaded, self.calibration, MAX_EXAMPLES if last else EARLY_EXAMPLES)
            # Of columns without validation records, those before.
            before = self.description.widths
            self.numbers.widths = widths = {k: before.get(k, {}) | found for k, found in (before | widths).items()}
            self.description = self.description.model_copy(update={"widths": widths})
        files: dict[str, str | bytes] = {MODEL_FILE: self.description.to_json(), TOKENIZER_FILE: self.tokenizer}
        return files | ({PREDICTORS_FILE: self.predictors} if self.predictors else {})

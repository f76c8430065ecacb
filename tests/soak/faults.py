"""The faults that planted_faults.py plants, and the tests that must catch each.

A fault is one that a user would suffer from, in a line or two. Its old text is in its file exactly
once: whoever rewrites those lines rewrites the fault, too. Constants that compiled loops of other
files have taken in are left alone: numba's cache on disk would not notice.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE_TESTS: dict[str, tuple[str, ...]] = {
    "top": (
        "tests/unit/test_backends.py",
        "tests/unit/test_contracts.py",
        "tests/unit/test_outside_faults.py",
        "tests/unit/test_metrics_baselines.py",
        "tests/unit/test_bad_input.py",
        "tests/unit/test_feed_stream.py",
        "tests/distributed/test_model.py",
    ),
    "config": ("tests/unit/test_config.py", "tests/end_to_end/test_pretrain.py"),
    "cells": (
        "tests/unit/test_cells_*.py",
        "tests/unit/test_bad_input.py",
        "tests/end_to_end/test_any_anndata.py",
    ),
    "store": (
        "tests/unit/test_store_*.py",
        "tests/unit/test_split_*.py",
        "tests/unit/test_flat_copy.py",
        "tests/unit/test_durable_files.py",
        "tests/end_to_end/test_ingest.py",
    ),
    "feed": (
        "tests/unit/test_feed*.py",
        "tests/unit/test_counts_source.py",
        "tests/unit/test_train_labels.py",
        "tests/distributed/test_packing.py",
    ),
    "parallel": (
        "tests/unit/test_watch.py",
        "tests/unit/test_roll_call.py",
        "tests/unit/test_interface.py",
        "tests/unit/test_dropout_seeds.py",
        "tests/distributed/test_layouts.py",
        "tests/distributed/test_embed.py",
        "tests/end_to_end/test_loopback.py",
        "tests/end_to_end/test_lost_ranks.py",
    ),
    "model": (
        "tests/unit/test_flops.py",
        "tests/unit/test_blockwise.py",
        "tests/unit/test_token_rows.py",
        "tests/distributed/test_model.py",
        "tests/distributed/test_attention_check.py",
        "tests/distributed/test_precision.py",
        "tests/distributed/test_packing.py",
        "tests/distributed/test_convert.py",
        "tests/distributed/test_embed.py",
        "tests/distributed/test_finetune.py",
        "tests/distributed/test_perturb.py",
        "tests/distributed/test_parity.py",
    ),
    "model/cores": (
        "tests/unit/test_blockwise.py",
        "tests/distributed/test_attention_check.py",
        "tests/distributed/test_model.py",
        "tests/distributed/test_packing.py",
        "tests/distributed/test_parity.py",
    ),
    "optim": (
        "tests/unit/test_schedule.py",
        "tests/distributed/test_update.py",
        "tests/distributed/test_resume.py",
        "tests/distributed/test_reshard.py",
        "tests/distributed/test_overlap.py",
        "tests/distributed/test_parity.py",
    ),
    "checkpoint": (
        "tests/unit/test_checkpoint_*.py",
        "tests/unit/test_plain_metadata.py",
        "tests/unit/test_safetensors_file.py",
        "tests/unit/test_durable_files.py",
        "tests/distributed/test_saving.py",
        "tests/distributed/test_resume.py",
        "tests/distributed/test_damage.py",
        "tests/distributed/test_reshard.py",
    ),
    "metrics": ("tests/unit/test_metrics_*.py", "tests/end_to_end/test_pretrain.py"),
    "train": (
        "tests/unit/test_guard.py",
        "tests/unit/test_run_folder.py",
        "tests/unit/test_train_labels.py",
        "tests/distributed/test_evaluate.py",
        "tests/distributed/test_update.py",
        "tests/distributed/test_parity.py",
        "tests/end_to_end/test_signals.py",
        "tests/end_to_end/test_pretrain.py",
        "tests/end_to_end/test_lost_ranks.py",
    ),
    "downstream": (
        "tests/unit/test_cross_validation.py",
        "tests/unit/test_scores.py",
        "tests/unit/test_overlap.py",
        "tests/unit/test_perturb_*.py",
        "tests/unit/test_seen_cells.py",
        "tests/distributed/test_embed.py",
        "tests/distributed/test_perturb.py",
        "tests/distributed/test_classify.py",
    ),
    "preflight": ("tests/unit/test_preflight.py", "tests/end_to_end/test_preflight.py"),
}
"""Package -> test files or globs, those first that end soon."""


@dataclass(frozen=True)
class Fault:
    """file: within geneformer_mcore;  first: test files that are run before those of the package,
    as they are the likeliest to catch it;  hangs: a user would see a job that does not end, so a
    test that waited for one in vain has caught it."""

    name: str
    package: str
    file: str
    old: str
    new: str
    first: tuple[str, ...] = ()
    hangs: bool = False


def _fault(
    package: str, name: str, file: str, old: str, new: str, *first: str, hangs: bool = False
) -> Fault:
    folder = "" if package == "top" else f"{package}/"
    return Fault(f"{package}: {name}", package, f"{folder}{file}", old, new, first, hangs)


CELLS = (
    _fault(
        "cells",
        "a tie is broken the other way",
        "kernels.py",
        "(values[a] == values[b] and tokens[a] < tokens[b])",
        "(values[a] == values[b] and tokens[a] > tokens[b])",
        "tests/unit/test_cells_ranks.py",
    ),
    _fault(
        "cells",
        "counts of one gene in two columns are not summed",
        "kernels.py",
        "        sums[token] += count\n",
        "        sums[token] = count\n",
        "tests/unit/test_cells_ranks.py",
    ),
    _fault(
        "cells",
        "unknown genes are not skipped",
        "kernels.py",
        "n += np.uint64(expressed & (token != 0))",
        "n += np.uint64(expressed)",
        "tests/unit/test_cells_ranks.py",
    ),
    _fault(
        "cells",
        "the last gene of a long cell is lost",
        "ranks.py",
        "                self.seq_length - 1,\n",
        "                self.seq_length - 2,\n",
        "tests/unit/test_cells_ranks.py",
    ),
    _fault(
        "cells",
        "medians are of shares of the known genes",
        "kernels.py",
        "        n, total, _, _ = gather_cell(",
        "        n, _, total, _ = gather_cell(",
        "tests/unit/test_cells_medians.py",
    ),
    _fault(
        "cells",
        "the median of an even number is the upper one",
        "medians.py",
        "np.median(values[offsets[gene] : offsets[gene + 1]])",
        'np.percentile(values[offsets[gene] : offsets[gene + 1]], 50, method="higher")',
        "tests/unit/test_cells_medians.py",
    ),
    _fault(
        "cells",
        "the checksum of a vocabulary is not compared",
        "vocabulary.py",
        "        if found != computed:\n",
        "        if not found:\n",
        "tests/unit/test_cells_vocabulary.py",
    ),
    _fault(
        "cells",
        "a pickled dictionary may name anything",
        "dictionary.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None',
        "return super().find_class(module, name)",
        "tests/unit/test_cells_dictionary.py",
    ),
    _fault(
        "cells",
        "a failed write leaves its temporary file",
        "files.py",
        "            partial.unlink()",
        "            partial.exists()",
        "tests/unit/test_cells_files.py",
    ),
)

STORE = (
    _fault(
        "store",
        "a finished unit is taken without its checksum",
        "unit_file.py",
        "return report if found == report.sha256 else None",
        "return report",
        "tests/unit/test_store_units.py",
    ),
    _fault(
        "store",
        "cells of the flat copy are given out unverified",
        "flat.py",
        "        self._verify(rows // BLOCK_CELLS)\n",
        "",
        "tests/unit/test_flat_copy.py",
    ),
    _fault(
        "store",
        "two writers of one folder",
        "staging.py",
        "FolderLock(self.path, str(target), part)",
        'FolderLock(self.path, str(target), part or "0/1")',
        "tests/unit/test_store_staging.py",
    ),
    _fault(
        "store",
        "the test split is empty or too small",
        "split.py",
        "(draws < self.validation_fraction + self.test_fraction)",
        "(draws < self.test_fraction)",
        "tests/unit/test_store_keys.py",
    ),
    _fault(
        "store",
        "a cell given twice is stored twice",
        "buckets.py",
        "        if first == second:\n",
        "        if first > second:\n",
        "tests/unit/test_store_build.py",
    ),
    _fault(
        "store",
        "cells without a known gene are stored",
        "tokenise.py",
        "ranked.n_known_N > 0",
        "ranked.n_genes_N > 0",
        "tests/unit/test_store_build.py",
    ),
    _fault(
        "store",
        "the only data set of a tissue is held out",
        "split_policy.py",
        "if self._number[label] <= 1]",
        "if self._number[label] <= 0]",
        "tests/unit/test_split_policy.py",
    ),
    _fault(
        "store",
        "a store is published before it is on the disk",
        "staging.py",
        "        sync_tree(self.store)\n",
        "",
        "tests/unit/test_durable_files.py",
    ),
)

FEED = (
    _fault(
        "feed",
        "predicted places are shifted by one",
        "kernels.py",
        "selected[k] = rows[b] + np.int64(places[k])",
        "selected[k] = rows[b] + np.int64(places[k]) - 1",
        "tests/unit/test_feed.py",
    ),
    _fault(
        "feed",
        "[CLS] may be hidden",
        "kernels.py",
        "for i in range(np.uint64(1), np.uint64(len(bits_S))):",
        "for i in range(np.uint64(0), np.uint64(len(bits_S))):",
        "tests/unit/test_feed.py",
    ),
    _fault(
        "feed",
        "the last cell of a span never comes",
        "order.py",
        "return first + permutation(size, order.seed, _CELLS, epoch, span)",
        "return first + permutation(size, order.seed, _CELLS, epoch, span) % max(1, size - 1)",
        "tests/unit/test_feed.py",
    ),
    _fault(
        "feed",
        "every epoch has the order of the first",
        "order.py",
        "counter=np.array([0, 0, index, epoch], dtype=np.uint64)",
        "counter=np.array([0, 0, index, 0], dtype=np.uint64)",
        "tests/unit/test_feed.py",
    ),
    _fault(
        "feed",
        "all data-parallel ranks take the cells of the first",
        "loader.py",
        "mine = slice(share.data_rank, None, share.data_size)",
        "mine = slice(0, None, share.data_size)",
        "tests/unit/test_feed_stream.py",
    ),
    _fault(
        "feed",
        "cells that fill a batch up are asked for",
        "labelled.py",
        "asked = np.flatnonzero(~idle_N)",
        "asked = np.arange(len(idle_N))",
        "tests/unit/test_train_labels.py",
    ),
    _fault(
        "feed",
        "packed cells take the tokens of their neighbours",
        "spans.py",
        "slot * self._slot_tokens + np.cumsum(lengths) - lengths",
        "slot * self._slot_tokens + np.cumsum(lengths) - lengths[0]",
        "tests/unit/test_feed_stream.py",
    ),
)

PARALLEL = (
    _fault(
        "parallel",
        "losses are not summed over ranks",
        "collectives.py",
        "    dist.all_reduce(total)\n    return total\n",
        "    return total\n",
        "tests/distributed/test_layouts.py",
    ),
    _fault(
        "parallel",
        "one rank's signal does not stop the others",
        "collectives.py",
        "dist.all_reduce(answers, op=dist.ReduceOp.MAX)",
        "dist.all_reduce(answers, op=dist.ReduceOp.MIN)",
        "tests/end_to_end/test_loopback.py",
        "tests/end_to_end/test_signals.py",
    ),
    _fault(
        "parallel",
        "every tensor rank's losses count",
        "collectives.py",
        "counts = topology.is_last_stage and topology.tensor_rank == 0",
        "counts = topology.is_last_stage",
        "tests/distributed/test_layouts.py",
    ),
    _fault(
        "parallel",
        "data-parallel ranks drop the same units",
        "groups.py",
        "topology.pipeline_rank * topology.data_size + topology.data_rank",
        "topology.pipeline_rank * topology.data_size",
        "tests/unit/test_dropout_seeds.py",
    ),
    _fault(
        "parallel",
        "the watch never fires",
        "watch.py",
        "        return time.monotonic() - since - allowed_s\n",
        "        return min(0.0, time.monotonic() - since - allowed_s)\n",
        "tests/unit/test_watch.py",
        hangs=True,
    ),
    _fault(
        "parallel",
        "silent ranks are taken for answering ones",
        "roll_call.py",
        "lost = sorted(set(range(world_size)) - answers.keys())",
        "lost = sorted(answers.keys() - set(range(world_size)))",
        "tests/unit/test_roll_call.py",
    ),
    _fault(
        "parallel",
        "rows that no rank has are zero",
        "collectives.py",
        "has = found[:, width] == 1",
        "has = found[:, width] >= 0",
        "tests/distributed/test_embed.py",
    ),
)

MODEL = (
    _fault(
        "model",
        "the mask of padding is shifted by one",
        "geneformer.py",
        "places_S >= batch.lengths_N[:, None]",
        "places_S > batch.lengths_N[:, None]",
        "tests/distributed/test_model.py",
    ),
    _fault(
        "model",
        "the residual stream is in the dtype of the weights",
        "fused.py",
        "return residual + F.dropout(x, p=probability, training=training)",
        "return (residual + F.dropout(x, p=probability, training=training)).to(x.dtype)",
        "tests/distributed/test_precision.py",
    ),
    _fault(
        "model",
        "FLOPs without attention",
        "flops.py",
        "return self.linear + self.attention + self.head + self.vocabulary",
        "return self.linear + self.head + self.vocabulary",
        "tests/unit/test_flops.py",
    ),
    _fault(
        "model",
        "query and key change places in Hugging Face's weights",
        "hf_keys.py",
        'for part in ("query", "key", "value"))',
        'for part in ("key", "query", "value"))',
        "tests/distributed/test_convert.py",
    ),
    _fault(
        "model",
        "the mean of a cell includes [CLS]",
        "states.py",
        """    genes_TH = rows_TH[((inside_BS > 0) & _is_real(batch)).flatten()].float()
    if len(batch.lengths_N) == 0:
        return genes_TH
    # Segments, not an index_add: the same order of addition each time, on a GPU too.
    return torch.segment_reduce(genes_TH, "mean", lengths=batch.lengths_N - 1)
""",
        """    genes_TH = rows_TH[((inside_BS >= 0) & _is_real(batch)).flatten()].float()
    if len(batch.lengths_N) == 0:
        return genes_TH
    return torch.segment_reduce(genes_TH, "mean", lengths=batch.lengths_N)
""",
        "tests/distributed/test_embed.py",
    ),
    _fault(
        "model",
        "one row of the padding of the vocabulary can be predicted",
        "head.py",
        "torch.where(ids < num_real, 0.0",
        "torch.where(ids <= num_real, 0.0",
        "tests/distributed/test_model.py",
    ),
    _fault(
        "model",
        "folded corrections are alpha times too large",
        "lora.py",
        "correction * (tune.lora_alpha / tune.lora_rank)",
        "correction * tune.lora_alpha",
        "tests/distributed/test_finetune.py",
    ),
    _fault(
        "model",
        "cells that move toward the goal are shown to move away",
        "shifts.py",
        "goal_N = (after_NH - before_NH) @",
        "goal_N = (before_NH - after_NH) @",
        "tests/distributed/test_perturb.py",
    ),
    _fault(
        "model/cores",
        "what dropout keeps is not enlarged",
        "blockwise.py",
        "self.enlarged = 2**32 / (2**32 - self.below)",
        "self.enlarged = 1.0",
        "tests/unit/test_blockwise.py",
    ),
    _fault(
        "model/cores",
        "the gradient of the query lacks the scale",
        "blockwise.py",
        "return [of_query.mul_(self.scale), of_key, of_value]",
        "return [of_query, of_key, of_value]",
        "tests/unit/test_blockwise.py",
        "tests/distributed/test_bench_steps.py",
    ),
    _fault(
        "model/cores",
        "padding is attended to and genes are not",
        "sdpa.py",
        "attn_mask=None if padding_B11S is None else ~padding_B11S",
        "attn_mask=None if padding_B11S is None else padding_B11S",
        "tests/distributed/test_attention_check.py",
    ),
    _fault(
        "model/cores",
        "packed cells attend to their neighbours",
        "base.py",
        "contexts = [attend(*one) for one in zip(*parts, strict=True)]",
        "contexts = [attend(query, key, value)]",
        "tests/distributed/test_packing.py",
    ),
)

OPTIM = (
    _fault(
        "optim",
        "biases and norms decay",
        "optimizer.py",
        'optim.weight_decay * group["wd_mult"]',
        "optim.weight_decay",
        "tests/distributed/test_update.py",
    ),
    _fault(
        "optim",
        "gradients are clipped on the first rank alone",
        "optimizer.py",
        "    if inner.config.clip_grad > 0:\n",
        "    if inner.config.clip_grad > 0 and torch.distributed.get_rank() == 0:\n",
        "tests/distributed/test_update.py",
    ),
    _fault(
        "optim",
        "moments are 0 after a restart",
        "optimizer.py",
        "    inner.load_parameter_state_from_fully_reshardable(moments)\n",
        "    assert inner\n",
        "tests/distributed/test_resume.py",
    ),
    _fault(
        "optim",
        "moments come from the wrong places in pipelines",
        "optimizer.py",
        "    _count_padding(chunks)\n    _overlap",
        "    _overlap",
        "tests/distributed/test_reshard.py",
    ),
    _fault(
        "optim",
        "the first step has a learning rate of 0",
        "schedule.py",
        "optim.lr * (step + 1) / warmup_steps",
        "optim.lr * step / warmup_steps",
        "tests/unit/test_schedule.py",
    ),
    _fault(
        "optim",
        "the output layer does not wait for its weights",
        "optimizer.py",
        "            chunk.param_to_bucket_group[weights].finish_param_sync()\n",
        "            assert weights is not None\n",
        "tests/distributed/test_overlap.py",
    ),
)

CHECKPOINT = (
    _fault(
        "checkpoint",
        "a checkpoint has its name before it is on the disk",
        "folder.py",
        "    sync_tree(staging)\n",
        "",
        "tests/unit/test_durable_files.py",
    ),
    _fault(
        "checkpoint",
        "hashes are not compared",
        "folder.py",
        'if size != expected["bytes"] or _hash_on_disk(path) != expected["sha256"]:',
        'if size != expected["bytes"]:',
        "tests/unit/test_checkpoint_folder.py",
    ),
    _fault(
        "checkpoint",
        "one checkpoint fewer is kept than asked for",
        "folder.py",
        "for step in steps(root)[:-keep_last]:",
        "for step in steps(root)[: 1 - keep_last or None]:",
        "tests/unit/test_checkpoint_folder.py",
    ),
    _fault(
        "checkpoint",
        "the worst step is kept as the best",
        "record.py",
        "return min(losses, key=lambda step: losses[step], default=None)",
        "return max(losses, key=lambda step: losses[step], default=None)",
        "tests/unit/test_checkpoint_record.py",
    ),
    _fault(
        "checkpoint",
        "a run continues on other cells",
        "record.py",
        "if before.content != now.content and not record.is_converted:",
        "if before.content != now.content and record.is_converted:",
        "tests/unit/test_checkpoint_record.py",
    ),
    _fault(
        "checkpoint",
        "dropout begins at its seed after a restart",
        "state.py",
        "    if rank is not None:\n        _load_random_states(folder, rank)\n",
        "",
        "tests/distributed/test_resume.py",
    ),
    _fault(
        "checkpoint",
        "an asynchronous save writes the random states of a later step",
        "state.py",
        "_write_random_states(self._random_states, self._folder, self._rank)",
        "_write_random_states(_random_states(), self._folder, self._rank)",
        "tests/distributed/test_saving.py",
    ),
    _fault(
        "checkpoint",
        "a description may run code",
        "plain_metadata.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}")',
        "return super().find_class(module, name)",
        "tests/unit/test_plain_metadata.py",
    ),
    _fault(
        "checkpoint",
        "what a killed save left stays",
        "folder.py",
        '    for leftover in root.glob(".*_step_*"):\n',
        '    for leftover in root.glob(".*_step_*.part"):\n',
        "tests/unit/test_checkpoint_folder.py",
    ),
)

METRICS = (
    _fault(
        "metrics",
        "TFLOPS are the job's and not a rank's",
        "meter.py",
        "executed_flops(self.shape, work) / seconds / self.world_size",
        "executed_flops(self.shape, work) / seconds",
        "tests/unit/test_metrics_meter.py",
    ),
    _fault(
        "metrics",
        "a record is the mean over all before",
        "meter.py",
        "        self._window = Window()\n        seconds = max(",
        "        seconds = max(",
        "tests/unit/test_metrics_meter.py",
    ),
    _fault(
        "metrics",
        "a step that is done again is there twice",
        "sinks.py",
        "if _step_in(line) <= step]",
        "if _step_in(line) <= step + 1]",
        "tests/unit/test_durable_files.py",
    ),
    _fault(
        "metrics",
        "the unigram counts [CLS]",
        "baselines.py",
        "    counts_V[:NUM_SPECIALS] = 0\n",
        "",
        "tests/unit/test_metrics_baselines.py",
    ),
    _fault(
        "metrics",
        "the commonest class is the one that is predicted most",
        "classified.py",
        "counts_CC.sum(axis=1).argmax()",
        "counts_CC.sum(axis=0).argmax()",
        "tests/unit/test_metrics_classified.py",
    ),
    _fault(
        "metrics",
        "infinity is written as no JSON",
        "sinks.py",
        "isinstance(value, float) and not math.isfinite(value)",
        "isinstance(value, float) and math.isnan(value)",
        "tests/unit/test_metrics_sinks.py",
    ),
)

TRAIN = (
    _fault(
        "train",
        "the loss is divided by cells and not by genes",
        "step.py",
        "torch.tensor(loss_M.numel(), dtype=torch.int, device=loss_M.device)",
        "torch.tensor(len(batch.lengths_N), dtype=torch.int, device=loss_M.device)",
        "tests/distributed/test_update.py",
    ),
    _fault(
        "train",
        "a restart begins at the first cell",
        "setup.py",
        "run.step, run.cells_seen = record.step, record.cells_seen",
        "run.step, run.cells_seen = record.step, 0",
        "tests/end_to_end/test_pretrain.py",
    ),
    _fault(
        "train",
        "nothing is saved on a signal",
        "loop.py",
        "                if run.step > saved_at:\n",
        "                if run.step < saved_at:\n",
        "tests/end_to_end/test_signals.py",
    ),
    _fault(
        "train",
        "an interrupted run ends with 1 and not 75",
        "loop.py",
        "return INTERRUPTED, _interrupted(run, interruption)",
        "return 1, _interrupted(run, interruption)",
        "tests/end_to_end/test_signals.py",
    ),
    _fault(
        "train",
        "a spike is what lies below the mean",
        "guard.py",
        "return (value - mean) / max(",
        "return (mean - value) / max(",
        "tests/unit/test_guard.py",
    ),
    _fault(
        "train",
        "a step that is not finite changes the weights",
        "step.py",
        "    if not left_out:\n",
        "    if grad_norm or not left_out:\n",
        "tests/end_to_end/test_lost_ranks.py",
    ),
    _fault(
        "train",
        "two starts share a run folder",
        "run_folder.py",
        "self._lock = lock_file(path)",
        "self._lock = lock_file(path, shared=True)",
        "tests/unit/test_run_folder.py",
    ),
    _fault(
        "train",
        "dropout is on while validating",
        "evaluate.py",
        "chunk.train(mode=False)",
        "chunk.train(mode=True)",
        "tests/distributed/test_evaluate.py",
    ),
    _fault(
        "train",
        "the last held-out cells are not validated on",
        "evaluate.py",
        "-(-feed.order.num_cells // feed.share.global_batch_size)",
        "feed.order.num_cells // feed.share.global_batch_size",
        "tests/distributed/test_evaluate.py",
    ),
)

DOWNSTREAM = (
    _fault(
        "downstream",
        "PCA is fitted on test cells, too",
        "cross_validation.py",
        "pca = principal_components(of_train, seed)",
        "pca = principal_components(features.values, seed)",
        "tests/unit/test_cross_validation.py",
    ),
    _fault(
        "downstream",
        "FDR without the sort",
        "controls.py",
        'found[known] = stats.false_discovery_control(p_P[known], method="bh")',
        "found[known] = np.minimum(1, p_P[known] * known.sum() / np.arange(1, known.sum() + 1))",
        "tests/unit/test_perturb_statistics.py",
    ),
    _fault(
        "downstream",
        "p may be 0",
        "controls.py",
        "above = (1 + np.sum(others >= effect)) / (1 + len(others))",
        "above = np.sum(others >= effect) / (1 + len(others))",
        "tests/unit/test_perturb_statistics.py",
    ),
    _fault(
        "downstream",
        "gene embeddings begin at a special token",
        "embed.py",
        "rows[NUM_SPECIALS : model.vocabulary.size]",
        "rows[NUM_SPECIALS - 1 : model.vocabulary.size - 1]",
        "tests/distributed/test_embed.py",
    ),
    _fault(
        "downstream",
        "windows of genes reach into the next cell",
        "overlap.py",
        "whole = owners[:last] == owners[WINDOW - 1 :][:last]",
        "whole = owners[:last] <= owners[WINDOW - 1 :][:last]",
        "tests/unit/test_overlap.py",
    ),
    _fault(
        "downstream",
        "an overexpressed cell loses its last gene",
        "variants.py",
        "[: self._encoder.seq_length]",
        "[: self._encoder.seq_length - 1]",
        "tests/unit/test_perturb_variants.py",
    ),
    _fault(
        "downstream",
        "macro F1 of a draw is over labels that it lacks, too",
        "scores.py",
        "f1.sum(axis=1) / (either > 0).sum(axis=1)",
        "f1.sum(axis=1) / num_labels",
        "tests/unit/test_scores.py",
    ),
    _fault(
        "downstream",
        "vectors slip by a row behind a cell without genes",
        "encoder.py",
        "yield start + known_N, values_NW",
        "yield start + np.arange(len(known_N)), values_NW",
        "tests/distributed/test_embed.py",
    ),
)

PREFLIGHT = (
    _fault(
        "preflight",
        "a clock that is behind passes",
        "checks.py",
        "if abs(each.offset.seconds) > MAX_OFFSET_S]",
        "if each.offset.seconds > MAX_OFFSET_S]",
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "the check of versions always passes",
        "checks.py",
        '    if differing:\n        return fails(\n            "versions",',
        '    if differing and not names:\n        return fails(\n            "versions",',
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "wrong sums of an all-reduce pass",
        "cluster.py",
        "is_right &= bool((values == expected).all())",
        "is_right &= bool((values <= expected).any())",
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "room for one checkpoint is enough",
        "checks.py",
        "    if view.free < needed:\n",
        "    if view.free < one:\n",
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "failing checks end with 0",
        "cluster.py",
        "code = exchange.broadcast(WRONG_INPUT if failing else FINISHED)",
        "code = exchange.broadcast(FINISHED)",
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "files of the check stay in the run folder",
        "cluster.py",
        "                path.unlink()\n",
        "                path.stat()\n",
        "tests/unit/test_preflight.py",
    ),
    _fault(
        "preflight",
        "the sign of a clock's offset",
        "cluster.py",
        "Offset(there - (sent + back) / 2, (back - sent) / 2)",
        "Offset((sent + back) / 2 - there, (back - sent) / 2)",
        "tests/unit/test_preflight.py",
    ),
)

CONFIG = (
    _fault(
        "config",
        "an unknown setting is passed over",
        "load.py",
        'problems.append(f"{origin}: there is no setting `{key}`.{hint}")',
        "assert hint is not None",
        "tests/unit/test_config.py",
    ),
    _fault(
        "config",
        "the global batch need not be a multiple",
        "derive.py",
        "if train.global_batch_size % per_pass:",
        "if train.global_batch_size < per_pass:",
        "tests/unit/test_config.py",
    ),
    _fault(
        "config",
        "the file overrides the command line",
        "load.py",
        "in [*below, *_file_values(file, problems), *above]:",
        "in [*below, *above, *_file_values(file, problems)]:",
        "tests/unit/test_config.py",
    ),
    _fault(
        "config",
        "the warm-up is as long as the hold",
        "derive.py",
        "warmup_steps=round(optim.warmup_fraction * train.steps)",
        "warmup_steps=round(optim.hold_fraction * train.steps)",
        "tests/unit/test_config.py",
    ),
)

TOP = (
    _fault(
        "top",
        "a failing network is the user's mistake",
        "commands.py",
        "    if isinstance(error, NetworkError):\n        return INTERRUPTED\n",
        "",
        "tests/unit/test_outside_faults.py",
    ),
    _fault(
        "top",
        "cells are gathered from where the first one lies",
        "contracts.py",
        "shift = np.repeat(self.starts_N - offsets[:-1], self.lengths_N)",
        "shift = np.repeat(self.starts_N[:1].repeat(len(self)), self.lengths_N)",
        "tests/unit/test_contracts.py",
    ),
    _fault(
        "top",
        "the last of the first cells is cut off",
        "contracts.py",
        "offsets = self.offsets[: number + 1]",
        "offsets = self.offsets[: max(1, number)]",
        "tests/unit/test_contracts.py",
    ),
    _fault(
        "top",
        "another project's apex is taken for NVIDIA's",
        "backends.py",
        '    if not any((folder / "optimizers").is_dir() for folder in folders):\n',
        "    if not folders:\n",
        "tests/unit/test_backends.py",
    ),
)

FAULTS = (
    *TOP,
    *CONFIG,
    *CELLS,
    *STORE,
    *FEED,
    *PARALLEL,
    *MODEL,
    *OPTIM,
    *CHECKPOINT,
    *METRICS,
    *TRAIN,
    *DOWNSTREAM,
    *PREFLIGHT,
)

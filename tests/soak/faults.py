"""The faults that planted_faults.py plants, and the tests that must catch each.

A fault is one that a user would suffer from, in a line or two. Its old text is in its file exactly
once: whoever rewrites those lines rewrites the fault, too. Constants that compiled loops of other
files have taken in are left alone: numba's cache on disk would not notice.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE_TESTS: dict[str, tuple[str, ...]] = {
    "top": (
        "tests/unit/top/test_types.py",
        "tests/unit/io/test_outside_faults.py",
        "tests/unit/training/test_metrics_baselines.py",
        "tests/unit/io/test_bad_input.py",
        "tests/unit/data/test_stream.py",
        "tests/distributed/training/test_model.py",
    ),
    "config": ("tests/unit/top/test_config.py", "tests/end_to_end/run/test_pretrain.py"),
    "io": ("tests/unit/io/test_*.py", "tests/end_to_end/commands/test_any_anndata.py"),
    "tokenizer": (
        "tests/unit/tokenizer/test_*.py",
        "tests/unit/io/test_bad_input.py",
        "tests/end_to_end/commands/test_any_anndata.py",
    ),
    "store": (
        "tests/unit/store/test_*.py",
        "tests/unit/io/test_durable_files.py",
        "tests/end_to_end/commands/test_ingest.py",
    ),
    "data": (
        "tests/unit/data/test_*.py",
        "tests/unit/training/test_labels.py",
        "tests/distributed/training/test_parity.py",
    ),
    "distributed": (
        "tests/unit/distributed/test_*.py",
        "tests/distributed/training/test_parity.py",
        "tests/distributed/inference/test_embed.py",
        "tests/end_to_end/run/test_loopback.py",
        "tests/end_to_end/run/test_lost_ranks.py",
    ),
    "model": (
        "tests/unit/model/test_*.py",
        "tests/distributed/training/test_model.py",
        "tests/distributed/training/test_attention_check.py",
        "tests/distributed/training/test_precision.py",
        "tests/distributed/inference/test_embed.py",
        "tests/distributed/inference/test_finetune.py",
        "tests/distributed/inference/test_perturb.py",
        "tests/distributed/training/test_parity.py",
    ),
    "optim": (
        "tests/unit/model/test_schedule.py",
        "tests/distributed/training/test_update.py",
        "tests/distributed/training/test_resume.py",
        "tests/distributed/training/test_reshard.py",
        "tests/distributed/training/test_overlap.py",
        "tests/distributed/training/test_parity.py",
    ),
    "checkpoint": (
        "tests/unit/training/test_checkpoint_*.py",
        "tests/unit/io/test_durable_files.py",
        "tests/distributed/training/test_saving.py",
        "tests/distributed/training/test_resume.py",
        "tests/distributed/training/test_damage.py",
        "tests/distributed/training/test_reshard.py",
    ),
    "metrics": ("tests/unit/training/test_metrics_*.py", "tests/end_to_end/run/test_pretrain.py"),
    "training": (
        "tests/unit/training/test_spike_guard.py",
        "tests/unit/training/test_run_folder.py",
        "tests/unit/training/test_labels.py",
        "tests/distributed/training/test_evaluate.py",
        "tests/distributed/training/test_update.py",
        "tests/distributed/training/test_parity.py",
        "tests/end_to_end/run/test_signals.py",
        "tests/end_to_end/run/test_pretrain.py",
        "tests/end_to_end/run/test_lost_ranks.py",
    ),
    "report": ("tests/unit/inference/test_report.py",),
    "inference": (
        "tests/unit/inference/test_data_leakage.py",
        "tests/distributed/inference/test_embed.py",
        "tests/distributed/inference/test_evaluate_command.py",
    ),
    "celltypes": (
        "tests/unit/inference/test_celltypes.py",
        "tests/distributed/inference/test_classify.py",
    ),
    "perturbation": (
        "tests/unit/inference/test_perturb_*.py",
        "tests/distributed/inference/test_perturb.py",
    ),
    "convert": (
        "tests/unit/inference/test_convert.py",
        "tests/distributed/inference/test_convert.py",
    ),
    "preflight": ("tests/unit/top/test_preflight.py", "tests/end_to_end/run/test_preflight.py"),
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


TOKENIZER = (
    _fault(
        "tokenizer",
        "a tie is broken the other way",
        "rank_encoder.py",
        "(values[a] == values[b] and tokens[a] < tokens[b])",
        "(values[a] == values[b] and tokens[a] > tokens[b])",
        "tests/unit/tokenizer/test_ranks.py",
    ),
    _fault(
        "tokenizer",
        "counts of one gene in two columns are not summed",
        "rank_encoder.py",
        "        sums[token] += count\n",
        "        sums[token] = count\n",
        "tests/unit/tokenizer/test_ranks.py",
    ),
    _fault(
        "tokenizer",
        "unknown genes are not skipped",
        "rank_encoder.py",
        "n += np.uint64(expressed & (token != 0))",
        "n += np.uint64(expressed)",
        "tests/unit/tokenizer/test_ranks.py",
    ),
    _fault(
        "tokenizer",
        "the last gene of a long cell is lost",
        "rank_encoder.py",
        "                self.seq_length - 1,\n",
        "                self.seq_length - 2,\n",
        "tests/unit/tokenizer/test_ranks.py",
    ),
    _fault(
        "tokenizer",
        "medians are of shares of the known genes",
        "rank_encoder.py",
        "        n, total, _, _ = gather_cell(",
        "        n, _, total, _ = gather_cell(",
        "tests/unit/tokenizer/test_medians.py",
    ),
    _fault(
        "tokenizer",
        "the median of an even number is the upper one",
        "medians.py",
        "np.median(values[offsets[gene] : offsets[gene + 1]])",
        'np.percentile(values[offsets[gene] : offsets[gene + 1]], 50, method="higher")',
        "tests/unit/tokenizer/test_medians.py",
    ),
    _fault(
        "tokenizer",
        "the checksum of a vocabulary is not compared",
        "vocabulary.py",
        "        if found != computed:\n",
        "        if not found:\n",
        "tests/unit/tokenizer/test_vocabulary.py",
    ),
    _fault(
        "tokenizer",
        "a pickled dictionary may name anything",
        "dictionary.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None',
        "return super().find_class(module, name)",
        "tests/unit/tokenizer/test_dictionary.py",
    ),
    _fault(
        "io",
        "a failed write leaves its temporary file",
        "files.py",
        "            partial.unlink()",
        "            partial.exists()",
        "tests/unit/io/test_files.py",
    ),
)

STORE = (
    _fault(
        "store",
        "a finished unit is taken without its checksum",
        "ingest/plan.py",
        "return report if found == report.sha256 else None",
        "return report",
        "tests/unit/store/test_units.py",
    ),
    _fault(
        "store",
        "cells of the flat copy are given out unverified",
        "local_cache.py",
        "        self._verify(rows // BLOCK_CELLS)\n",
        "",
        "tests/unit/store/test_local_cache.py",
    ),
    _fault(
        "store",
        "two writers of one folder",
        "ingest/staging.py",
        "FolderLock(self.path, str(target), part)",
        'FolderLock(self.path, str(target), part or "0/1")',
        "tests/unit/store/test_staging.py",
    ),
    _fault(
        "store",
        "the test split is empty or too small",
        "split/table.py",
        "(draws < self.validation_fraction + self.test_fraction)",
        "(draws < self.test_fraction)",
        "tests/unit/store/test_keys.py",
    ),
    _fault(
        "store",
        "a cell given twice is stored twice",
        "ingest/buckets.py",
        "        if first == second:\n",
        "        if first > second:\n",
        "tests/unit/store/test_build.py",
    ),
    _fault(
        "store",
        "cells without a known gene are stored",
        "ingest/tokenise.py",
        "ranked.n_known_N > 0",
        "ranked.n_genes_N > 0",
        "tests/unit/store/test_build.py",
    ),
    _fault(
        "store",
        "the only data set of a tissue is held out",
        "split/policy.py",
        "if self._number[label] <= 1]",
        "if self._number[label] <= 0]",
        "tests/unit/store/test_split_policy.py",
    ),
    _fault(
        "store",
        "a store is published before it is on the disk",
        "ingest/staging.py",
        "        sync_tree(self.store)\n",
        "",
        "tests/unit/io/test_durable_files.py",
    ),
)

DATA = (
    _fault(
        "data",
        "predicted places are shifted by one",
        "collate.py",
        "selected[k] = rows[b] + np.int64(places[k])",
        "selected[k] = rows[b] + np.int64(places[k]) - 1",
        "tests/unit/data/test_feed.py",
    ),
    _fault(
        "data",
        "[CLS] may be hidden",
        "collate.py",
        "for i in range(np.uint64(1), np.uint64(len(bits_S))):",
        "for i in range(np.uint64(0), np.uint64(len(bits_S))):",
        "tests/unit/data/test_feed.py",
    ),
    _fault(
        "data",
        "the last cell of a span never comes",
        "sampler.py",
        "return first + permutation(size, order.seed, _CELLS, epoch, span)",
        "return first + permutation(size, order.seed, _CELLS, epoch, span) % max(1, size - 1)",
        "tests/unit/data/test_feed.py",
    ),
    _fault(
        "data",
        "every epoch has the order of the first",
        "sampler.py",
        "counter=np.array([0, 0, index, epoch], dtype=np.uint64)",
        "counter=np.array([0, 0, index, 0], dtype=np.uint64)",
        "tests/unit/data/test_feed.py",
    ),
    _fault(
        "data",
        "all data-parallel ranks take the cells of the first",
        "loader.py",
        "mine = slice(share.data_rank, None, share.data_size)",
        "mine = slice(0, None, share.data_size)",
        "tests/unit/data/test_stream.py",
    ),
    _fault(
        "data",
        "cells that fill a batch up are asked for",
        "labelled.py",
        "asked = np.flatnonzero(~idle_N)",
        "asked = np.arange(len(idle_N))",
        "tests/unit/training/test_labels.py",
    ),
    _fault(
        "data",
        "packed cells take the tokens of their neighbours",
        "shuffle_buffer.py",
        "slot * self._slot_tokens + np.cumsum(lengths) - lengths",
        "slot * self._slot_tokens + np.cumsum(lengths) - lengths[0]",
        "tests/unit/data/test_stream.py",
    ),
)

DISTRIBUTED = (
    _fault(
        "distributed",
        "losses are not summed over ranks",
        "collectives.py",
        "    dist.all_reduce(total)\n    return total\n",
        "    return total\n",
        "tests/distributed/training/test_parity.py",
    ),
    _fault(
        "distributed",
        "one rank's signal does not stop the others",
        "collectives.py",
        "dist.all_reduce(answers, op=dist.ReduceOp.MAX)",
        "dist.all_reduce(answers, op=dist.ReduceOp.MIN)",
        "tests/end_to_end/run/test_loopback.py",
        "tests/end_to_end/run/test_signals.py",
    ),
    _fault(
        "distributed",
        "every tensor rank's losses count",
        "collectives.py",
        "counts = topology.is_last_stage and topology.tensor_rank == 0",
        "counts = topology.is_last_stage",
        "tests/distributed/training/test_parity.py",
    ),
    _fault(
        "distributed",
        "data-parallel ranks drop the same units",
        "groups.py",
        "topology.pipeline_rank * topology.data_size + topology.data_rank",
        "topology.pipeline_rank * topology.data_size",
        "tests/unit/distributed/test_network.py",
    ),
    _fault(
        "distributed",
        "the watch never fires",
        "watchdog.py",
        "        return time.monotonic() - since - allowed_s\n",
        "        return min(0.0, time.monotonic() - since - allowed_s)\n",
        "tests/unit/distributed/test_watchdog.py",
        hangs=True,
    ),
    _fault(
        "distributed",
        "silent ranks are taken for answering ones",
        "watchdog.py",
        "lost = sorted(set(range(world_size)) - answers.keys())",
        "lost = sorted(answers.keys() - set(range(world_size)))",
        "tests/unit/distributed/test_watchdog.py",
    ),
    _fault(
        "distributed",
        "rows that no rank has are zero",
        "collectives.py",
        "has = found[:, width] == 1",
        "has = found[:, width] >= 0",
        "tests/distributed/inference/test_embed.py",
    ),
)

MODEL = (
    _fault(
        "model",
        "the mask of padding is shifted by one",
        "geneformer.py",
        "places_S >= batch.lengths_N[:, None]",
        "places_S > batch.lengths_N[:, None]",
        "tests/distributed/training/test_model.py",
    ),
    _fault(
        "model",
        "the residual stream is in the dtype of the weights",
        "fused.py",
        "return residual + F.dropout(x, p=probability, training=training)",
        "return (residual + F.dropout(x, p=probability, training=training)).to(x.dtype)",
        "tests/distributed/training/test_precision.py",
    ),
    _fault(
        "model",
        "FLOPs without attention",
        "flops.py",
        "return self.linear + self.attention + self.head + self.vocabulary",
        "return self.linear + self.head + self.vocabulary",
        "tests/unit/model/test_flops.py",
    ),
    _fault(
        "convert",
        "query and key change places in Hugging Face's weights",
        "hf_keys.py",
        'for part in ("query", "key", "value"))',
        'for part in ("key", "query", "value"))',
        "tests/distributed/inference/test_convert.py",
    ),
    _fault(
        "model",
        "the mean of a cell includes [CLS]",
        "forward_only.py",
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
        "tests/distributed/inference/test_embed.py",
    ),
    _fault(
        "model",
        "one row of the padding of the vocabulary can be predicted",
        "masked_gene_loss.py",
        "torch.where(ids < num_real, 0.0",
        "torch.where(ids <= num_real, 0.0",
        "tests/distributed/training/test_model.py",
    ),
    _fault(
        "model",
        "folded corrections are alpha times too large",
        "lora.py",
        "correction * (tune.lora_alpha / tune.lora_rank)",
        "correction * tune.lora_alpha",
        "tests/distributed/inference/test_finetune.py",
    ),
    _fault(
        "model",
        "cells that move toward the goal are shown to move away",
        "forward_only.py",
        "goal_N = (after_NH - before_NH) @",
        "goal_N = (before_NH - after_NH) @",
        "tests/distributed/inference/test_perturb.py",
    ),
    _fault(
        "model",
        "what dropout keeps is not enlarged",
        "attention/blockwise.py",
        "self.enlarged = 2**32 / (2**32 - self.below)",
        "self.enlarged = 1.0",
        "tests/unit/model/test_blockwise.py",
    ),
    _fault(
        "model",
        "the gradient of the query lacks the scale",
        "attention/blockwise.py",
        "return [of_query.mul_(self.scale), of_key, of_value]",
        "return [of_query, of_key, of_value]",
        "tests/unit/model/test_blockwise.py",
        "tests/distributed/test_bench_steps.py",
    ),
    _fault(
        "model",
        "padding is attended to and genes are not",
        "attention/backends.py",
        "attn_mask=None if padding_B11S is None else ~padding_B11S",
        "attn_mask=None if padding_B11S is None else padding_B11S",
        "tests/distributed/training/test_attention_check.py",
    ),
    _fault(
        "model",
        "packed cells attend to their neighbours",
        "attention/base.py",
        "contexts = [attend(*one) for one in zip(*parts, strict=True)]",
        "contexts = [attend(query, key, value)]",
        "tests/distributed/training/test_parity.py",
    ),
)

OPTIM = (
    _fault(
        "optim",
        "biases and norms decay",
        "optimizer.py",
        'optim.weight_decay * group["wd_mult"]',
        "optim.weight_decay",
        "tests/distributed/training/test_update.py",
    ),
    _fault(
        "optim",
        "gradients are clipped on the first rank alone",
        "optimizer.py",
        "    if inner.config.clip_grad > 0:\n",
        "    if inner.config.clip_grad > 0 and torch.distributed.get_rank() == 0:\n",
        "tests/distributed/training/test_update.py",
    ),
    _fault(
        "optim",
        "moments are 0 after a restart",
        "optimizer.py",
        "    inner.load_parameter_state_from_fully_reshardable(moments)\n",
        "    assert inner\n",
        "tests/distributed/training/test_resume.py",
    ),
    _fault(
        "optim",
        "moments come from the wrong places in pipelines",
        "optimizer.py",
        "    _count_padding(chunks)\n    _overlap",
        "    _overlap",
        "tests/distributed/training/test_reshard.py",
    ),
    _fault(
        "optim",
        "the first step has a learning rate of 0",
        "optimizer.py",
        "optim.lr * (step + 1) / warmup_steps",
        "optim.lr * step / warmup_steps",
        "tests/unit/model/test_schedule.py",
    ),
    _fault(
        "optim",
        "the output layer does not wait for its weights",
        "optimizer.py",
        "            chunk.param_to_bucket_group[weights].finish_param_sync()\n",
        "            assert weights is not None\n",
        "tests/distributed/training/test_overlap.py",
    ),
)

CHECKPOINT = (
    _fault(
        "checkpoint",
        "a checkpoint has its name before it is on the disk",
        "folder.py",
        "    sync_tree(staging)\n",
        "",
        "tests/unit/io/test_durable_files.py",
    ),
    _fault(
        "checkpoint",
        "hashes are not compared",
        "folder.py",
        'if size != expected["bytes"] or _hash_on_disk(path) != expected["sha256"]:',
        'if size != expected["bytes"]:',
        "tests/unit/training/test_checkpoint_folder.py",
    ),
    _fault(
        "checkpoint",
        "one checkpoint fewer is kept than asked for",
        "folder.py",
        "for step in steps(root)[:-keep_last]:",
        "for step in steps(root)[: 1 - keep_last or None]:",
        "tests/unit/training/test_checkpoint_folder.py",
    ),
    _fault(
        "checkpoint",
        "the worst step is kept as the best",
        "record.py",
        "return min(losses, key=lambda step: losses[step], default=None)",
        "return max(losses, key=lambda step: losses[step], default=None)",
        "tests/unit/training/test_checkpoint_record.py",
    ),
    _fault(
        "checkpoint",
        "a run continues on other cells",
        "record.py",
        "if before.content != now.content and not record.is_converted:",
        "if before.content != now.content and record.is_converted:",
        "tests/unit/training/test_checkpoint_record.py",
    ),
    _fault(
        "checkpoint",
        "dropout begins at its seed after a restart",
        "state.py",
        "    if rank is not None:\n        _load_random_states(folder, rank)\n",
        "",
        "tests/distributed/training/test_resume.py",
    ),
    _fault(
        "checkpoint",
        "an asynchronous save writes the random states of a later step",
        "state.py",
        "_write_random_states(self._random_states, self._folder, self._rank)",
        "_write_random_states(_random_states(), self._folder, self._rank)",
        "tests/distributed/training/test_saving.py",
    ),
    _fault(
        "checkpoint",
        "a description may run code",
        "safe_metadata.py",
        'raise pickle.UnpicklingError(f"it asks for {module}.{name}")',
        "return super().find_class(module, name)",
        "tests/unit/training/test_checkpoint_record.py",
    ),
    _fault(
        "checkpoint",
        "what a killed save left stays",
        "folder.py",
        '    for leftover in root.glob(".*_step_*"):\n',
        '    for leftover in root.glob(".*_step_*.part"):\n',
        "tests/unit/training/test_checkpoint_folder.py",
    ),
)

METRICS = (
    _fault(
        "metrics",
        "TFLOPS are the job's and not a rank's",
        "meter.py",
        "executed_flops(self.shape, work) / seconds / self.world_size",
        "executed_flops(self.shape, work) / seconds",
        "tests/unit/training/test_metrics_meter.py",
    ),
    _fault(
        "metrics",
        "a record is the mean over all before",
        "meter.py",
        "        self._window = Window()\n        seconds = max(",
        "        seconds = max(",
        "tests/unit/training/test_metrics_meter.py",
    ),
    _fault(
        "metrics",
        "a step that is done again is there twice",
        "sinks.py",
        "if _step_in(line) <= step]",
        "if _step_in(line) <= step + 1]",
        "tests/unit/io/test_durable_files.py",
    ),
    _fault(
        "metrics",
        "the unigram counts [CLS]",
        "baselines.py",
        "    counts_V[:NUM_SPECIALS] = 0\n",
        "",
        "tests/unit/training/test_metrics_baselines.py",
    ),
    _fault(
        "metrics",
        "the commonest class is the one that is predicted most",
        "classified.py",
        "counts_CC.sum(axis=1).argmax()",
        "counts_CC.sum(axis=0).argmax()",
        "tests/unit/training/test_metrics_baselines.py",
    ),
    _fault(
        "metrics",
        "infinity is written as no JSON",
        "sinks.py",
        "isinstance(value, float) and not math.isfinite(value)",
        "isinstance(value, float) and math.isnan(value)",
        "tests/unit/training/test_metrics_sinks.py",
    ),
)

TRAINING = (
    _fault(
        "training",
        "the loss is divided by cells and not by genes",
        "step.py",
        "torch.tensor(loss_M.numel(), dtype=torch.int, device=loss_M.device)",
        "torch.tensor(len(batch.lengths_N), dtype=torch.int, device=loss_M.device)",
        "tests/distributed/training/test_update.py",
    ),
    _fault(
        "training",
        "a restart begins at the first cell",
        "setup.py",
        "run.step, run.cells_seen = record.step, record.cells_seen",
        "run.step, run.cells_seen = record.step, 0",
        "tests/end_to_end/run/test_pretrain.py",
    ),
    _fault(
        "training",
        "nothing is saved on a signal",
        "trainer.py",
        "                if run.step > saved_at:\n",
        "                if run.step < saved_at:\n",
        "tests/end_to_end/run/test_signals.py",
    ),
    _fault(
        "training",
        "an interrupted run ends with 1 and not 75",
        "trainer.py",
        "return INTERRUPTED, _interrupted(run, interruption)",
        "return 1, _interrupted(run, interruption)",
        "tests/end_to_end/run/test_signals.py",
    ),
    _fault(
        "training",
        "a spike is what lies below the mean",
        "spike_guard.py",
        "return (value - mean) / max(",
        "return (mean - value) / max(",
        "tests/unit/training/test_spike_guard.py",
    ),
    _fault(
        "training",
        "a step that is not finite changes the weights",
        "step.py",
        "    if not left_out:\n",
        "    if grad_norm or not left_out:\n",
        "tests/end_to_end/run/test_lost_ranks.py",
    ),
    _fault(
        "training",
        "two starts share a run folder",
        "run_folder.py",
        "self._lock = lock_file(path)",
        "self._lock = lock_file(path, shared=True)",
        "tests/unit/training/test_run_folder.py",
    ),
    _fault(
        "training",
        "dropout is on while validating",
        "step.py",
        "chunk.train(mode=False)",
        "chunk.train(mode=True)",
        "tests/distributed/training/test_evaluate.py",
    ),
    _fault(
        "training",
        "the last held-out cells are not validated on",
        "step.py",
        "-(-feed.order.num_cells // feed.share.global_batch_size)",
        "feed.order.num_cells // feed.share.global_batch_size",
        "tests/distributed/training/test_evaluate.py",
    ),
)

INFERENCE = (
    _fault(
        "celltypes",
        "PCA is fitted on test cells, too",
        "cross_validation.py",
        "pca = principal_components(of_train, seed)",
        "pca = principal_components(features.values, seed)",
        "tests/unit/inference/test_celltypes.py",
    ),
    _fault(
        "perturbation",
        "FDR without the sort",
        "statistics.py",
        'found[known] = stats.false_discovery_control(p_P[known], method="bh")',
        "found[known] = np.minimum(1, p_P[known] * known.sum() / np.arange(1, known.sum() + 1))",
        "tests/unit/inference/test_perturb_statistics.py",
    ),
    _fault(
        "perturbation",
        "p may be 0",
        "statistics.py",
        "above = (1 + np.sum(others >= effect)) / (1 + len(others))",
        "above = np.sum(others >= effect) / (1 + len(others))",
        "tests/unit/inference/test_perturb_statistics.py",
    ),
    _fault(
        "inference",
        "gene embeddings begin at a special token",
        "embed.py",
        "rows[NUM_SPECIALS : model.vocabulary.size]",
        "rows[NUM_SPECIALS - 1 : model.vocabulary.size - 1]",
        "tests/distributed/inference/test_embed.py",
    ),
    _fault(
        "inference",
        "windows of genes reach into the next cell",
        "data_leakage.py",
        "whole = owners[:last] == owners[WINDOW - 1 :][:last]",
        "whole = owners[:last] <= owners[WINDOW - 1 :][:last]",
        "tests/unit/inference/test_data_leakage.py",
    ),
    _fault(
        "perturbation",
        "an overexpressed cell loses its last gene",
        "perturbed_cells.py",
        "[: self._encoder.seq_length]",
        "[: self._encoder.seq_length - 1]",
        "tests/unit/inference/test_perturb_variants.py",
    ),
    _fault(
        "celltypes",
        "macro F1 of a draw is over labels that it lacks, too",
        "cross_validation.py",
        "f1.sum(axis=1) / (either > 0).sum(axis=1)",
        "f1.sum(axis=1) / num_labels",
        "tests/unit/inference/test_celltypes.py",
    ),
    _fault(
        "inference",
        "vectors slip by a row behind a cell without genes",
        "encoder.py",
        "yield start + known_N, values_NW",
        "yield start + np.arange(len(known_N)), values_NW",
        "tests/distributed/inference/test_embed.py",
    ),
)

PREFLIGHT = (
    _fault(
        "preflight",
        "a clock that is behind passes",
        "checks.py",
        "if abs(each.offset.seconds) > MAX_OFFSET_S]",
        "if each.offset.seconds > MAX_OFFSET_S]",
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "the check of versions always passes",
        "checks.py",
        '        "versions",\n        differing,\n',
        '        "versions",\n        not names,\n',
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "wrong sums of an all-reduce pass",
        "cluster.py",
        "is_right &= bool((values == expected).all())",
        "is_right &= bool((values <= expected).any())",
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "room for one checkpoint is enough",
        "checks.py",
        "    if view.free < needed:\n",
        "    if view.free < one:\n",
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "failing checks end with 0",
        "cluster.py",
        "code = exchange.broadcast(WRONG_INPUT if failing else FINISHED)",
        "code = exchange.broadcast(FINISHED)",
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "files of the check stay in the run folder",
        "cluster.py",
        "                path.unlink()\n",
        "                path.stat()\n",
        "tests/unit/top/test_preflight.py",
    ),
    _fault(
        "preflight",
        "the sign of a clock's offset",
        "cluster.py",
        "Offset(there - (sent + back) / 2, (back - sent) / 2)",
        "Offset((sent + back) / 2 - there, (back - sent) / 2)",
        "tests/unit/top/test_preflight.py",
    ),
)

CONFIG = (
    _fault(
        "config",
        "an unknown setting is passed over",
        "load.py",
        'problems.append(f"{origin}: there is no setting `{key}`.{hint}")',
        "assert hint is not None",
        "tests/unit/top/test_config.py",
    ),
    _fault(
        "config",
        "the global batch need not be a multiple",
        "derive.py",
        "if train.global_batch_size % per_pass:",
        "if train.global_batch_size < per_pass:",
        "tests/unit/top/test_config.py",
    ),
    _fault(
        "config",
        "the file overrides the command line",
        "load.py",
        "[*below, *_file_values(file, problems), *above]",
        "[*below, *above, *_file_values(file, problems)]",
        "tests/unit/top/test_config.py",
    ),
    _fault(
        "config",
        "the warm-up is as long as the hold",
        "derive.py",
        "warmup_steps=round(optim.warmup_fraction * train.steps)",
        "warmup_steps=round(optim.hold_fraction * train.steps)",
        "tests/unit/top/test_config.py",
    ),
)

TOP = (
    _fault(
        "top",
        "a failing network is the user's mistake",
        "exit_codes.py",
        "    if isinstance(error, NetworkError):\n        return INTERRUPTED\n",
        "",
        "tests/unit/io/test_outside_faults.py",
    ),
    _fault(
        "top",
        "cells are gathered from where the first one lies",
        "types.py",
        "shift = np.repeat(self.starts_N - offsets[:-1], self.lengths_N)",
        "shift = np.repeat(self.starts_N[:1].repeat(len(self)), self.lengths_N)",
        "tests/unit/top/test_types.py",
    ),
    _fault(
        "top",
        "the last of the first cells is cut off",
        "types.py",
        "offsets = self.offsets[: number + 1]",
        "offsets = self.offsets[: max(1, number)]",
        "tests/unit/top/test_types.py",
    ),
    _fault(
        "top",
        "another project's apex is taken for NVIDIA's",
        "backends.py",
        '    if not any((folder / "optimizers").is_dir() for folder in folders):\n',
        "    if not folders:\n",
        "tests/unit/top/test_types.py",
    ),
)

OTHERS = (
    _fault(
        "io",
        "negative counts pass",
        "blocks.py",
        "if not (value >= 0.0 and value < np.inf):  # NaN",
        "if not (value < np.inf):  # NaN",
        "tests/unit/io/test_bad_input.py",
    ),
    _fault(
        "report",
        "the rates of a run are their means",
        "results.py",
        "return statistics.median(values) if values else None",
        "return statistics.mean(values) if values else None",
        "tests/unit/inference/test_report.py",
    ),
    _fault(
        "report",
        "a loss that is worse than a baseline is shown as better",
        "results.py",
        '"below" if validation < baselines[name]',
        '"below" if validation > baselines[name]',
        "tests/unit/inference/test_report.py",
    ),
    _fault(
        "convert",
        "exported tokens are in our order and not in theirs",
        "token_rows.py",
        "return ours[known[rows[known].argsort()]]",
        "return ours[known]",
        "tests/unit/inference/test_convert.py",
    ),
)

FAULTS = (
    *OTHERS,
    *TOP,
    *CONFIG,
    *TOKENIZER,
    *STORE,
    *DATA,
    *DISTRIBUTED,
    *MODEL,
    *OPTIM,
    *CHECKPOINT,
    *METRICS,
    *TRAINING,
    *INFERENCE,
    *PREFLIGHT,
)

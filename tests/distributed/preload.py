"""What forked ranks and runs need, imported once in the process they are forked from."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.transformer.moe.experts  # noqa: F401  # as the first model does

    import launch.embed
    import launch.evaluate
    import launch.finetune
    import launch.pretrain  # noqa: F401
    from geneformer_mcore.distributed import device
    from tests.distributed import toy

# Whatever a command asks for: threads of small products only wait for each other, and burn a core
# each while they do.
device._fair_threads = lambda: 1
# The first call of a compiled loop takes a second, and Megatron looks at every object at each save.
for packing in ("false", "true"):
    made = toy.load(None, [*toy.SETTINGS, f"data.packing={packing}"])[0]
    toy.feed(made, toy.LONE).step(0)
gc.freeze()

"""What a run reports: meter, peak of the device, sinks, baselines, provenance (floor 8).

    steps -> Meter (window sums) -> record -> Sinks (console, log.txt, metrics.jsonl, TensorBoard)

Import the modules by name: this file imports nothing, so that a benchmark can use the meter where
TensorBoard is not installed.
"""

"""Meter, peak of the device, sinks, baselines, provenance (floor 8). Imports nothing: a benchmark
uses the meter without TensorBoard."""

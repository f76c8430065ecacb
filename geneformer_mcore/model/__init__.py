"""The encoder and its prediction head on Megatron-Core (floor 7)."""

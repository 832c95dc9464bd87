"""`qwen2vl plan`: what a run will need and do, before it is paid for. Lengths and arithmetic only, no model."""

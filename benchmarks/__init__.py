"""Speed and memory of fish-tuning beside its floor and its alternatives, side by side in one run.

`make bench` measures on the processor, `make bench-gpu` on an accelerator; the results are in
`benchmarks/results/`.
"""

"""`python -m bench.gpu_check`: what one GPU does with this code: right or wrong, how fast, at what energy."""

"""The benchmarks that evaluate.py reads, and the script that downloads them."""

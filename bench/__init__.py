"""The benchmarks: `bench/run` measures berth and its peers, and writes the table of docs/performance.md."""

# The quick extent, what it found, and the tests of capturing: 70 s in all.
timeout -k 3 56 python3 -m bench.gpu --quick --seconds 34 --compile-seconds 12 --out /tmp/gpu-quick.json > /tmp/gpu-quick.txt 2>&1
echo "rc $?"; tail -c 3000 /tmp/gpu-quick.txt
python3 -m bench.gpu_report /tmp/gpu-quick.json | cut -c1-400
grep "^| \(indexed\|block\|masked\|FFN\|layer\|bge\|12 x\|work\)\|^- " /tmp/gpu-quick.md | cut -c1-330
timeout 14 python3 -m pytest -q -p no:cacheprovider -m gpu tests/test_bench_gpu.py 2>&1 | tail -5

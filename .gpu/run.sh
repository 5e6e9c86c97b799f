# Batch: the quick extent, within 70 s, and what it found, short.
timeout 66 python3 -m bench.gpu --quick --seconds 40 --compile-seconds 12 --out /tmp/gpu-quick.json > /tmp/gpu-quick.txt 2>&1
echo "rc $?"; tail -c 2500 /tmp/gpu-quick.txt
grep -v "^- torch\|^$" /tmp/gpu-quick.md | cut -c1-420

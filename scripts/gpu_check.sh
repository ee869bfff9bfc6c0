#!/usr/bin/env bash
# Run the tests that need a GPU, and the benchmark of all presets, without network and within 10 minutes on one H100:
#
#     scripts/gpu_check.sh OUT        on a GPU
#     scripts/gpu_check.sh OUT cpu    rehearsal on a CPU: the tests that a CPU can run, and a tiny network
#
# OUT gets tests.json, gpu_check.log, and for each part of the benchmark a folder with benchmark.json and benchmark.md:
# `all`, all presets without compilation, and `compiled`. PYTHON names the interpreter: .venv's if there is one, else
# python3. MINUTES is the time for `all`, 4. The exit status is 0 only if all tests passed and both parts ended.
set -uo pipefail
if [[ $# -lt 1 || $# -gt 2 || ${2:-cuda} != @(cuda|cpu) ]]; then
    echo "usage: scripts/gpu_check.sh OUT [cpu]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
device=${2:-cuda}
cd "$(dirname "$0")/.." || exit 2
if [[ -z ${PYTHON:-} ]]; then PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3); fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
if [[ $device == cpu ]]; then export DIFFUSERS_IMAGEN_GPU_TESTS=cpu; fi

"$PYTHON" - "$device" <<'END' || exit 2
import sys
from importlib.util import find_spec

needed = "torch diffusers transformers accelerate safetensors huggingface_hub numpy PIL tqdm filelock jinja2 pytest datasets"
missing = [name for name in needed.split() if find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check.sh: {sys.executable} lacks {', '.join(missing)}")
optional = [name for name in ("bitsandbytes", "flash_attn", "imagen_pytorch") if find_spec(name) is None]
if optional:
    print(f"gpu_check.sh: not installed, and left out: {', '.join(optional)}")
if sys.argv[1] == "cuda":
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check.sh: torch sees no GPU; for a rehearsal on the CPU: scripts/gpu_check.sh OUT cpu")
END

selected=(-m gpu tests/test_gpu.py tests/test_gpu_compiled.py)
if [[ $device == cuda ]]; then  # and those of diffusers' tester classes
    selected=(-m "gpu or cpu_offload or group_offload or memory" tests/test_gpu.py tests/test_gpu_compiled.py tests/models)
fi
"$PYTHON" -m pytest -q -p no:cacheprovider "${selected[@]}" --junitxml="$out/tests.xml" 2>&1 | tee "$out/gpu_check.log"
passed=${PIPESTATUS[0]}
"$PYTHON" - "$out" <<'END' || passed=2
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

out = Path(sys.argv[1])
tests = {}
for case in ElementTree.parse(out / "tests.xml").iter("testcase"):
    states = [child for child in case if child.tag in ("failure", "error", "skipped")]
    result = states[0].tag if states else "passed"
    reason = " ".join((states[0].get("message") or "").split())[:300] if states else None
    tests[f"{case.get('classname')}::{case.get('name')}"] = {"result": result, "seconds": float(case.get("time")), "reason": reason}
(out / "tests.json").write_text(json.dumps(tests, indent=2) + "\n")
END

measure() {  # a name of a folder in OUT, and the options of the benchmark
    "$PYTHON" scripts/benchmark.py --device "$device" --output_dir "$out/$1" "${@:2}" 2>&1 | tee -a "$out/gpu_check.log"
    return "${PIPESTATUS[0]}"
}

measured=0
if [[ $device == cuda ]]; then
    eager=(ours plain diffusers deepfloyd imagen-pytorch)
    measure all --what step training stage cascade normalization --presets all --dtype bfloat16 --repeats 20 \
        --systems "${eager[@]}" --attention_backends all --memory_formats channels_last contiguous \
        --minutes "${MINUTES:-4}" || measured=1
    measure compiled --what step --presets 500m_res_64 --dtype bfloat16 --repeats 20 --systems ours compiled \
        --compile blocks --minutes 1 || measured=1
else
    tiny=(sample_size=16 "block_out_channels=(16,32)" layers_per_block=1 "attention_resolutions=(8,)"
        attention_head_dim=8 encoder_hid_dim=16 cross_attention_dim=16 norm_num_groups=4)
    measure tiny --what step training stage --presets emoji_base_64 --systems ours plain diffusers --repeats 3 \
        --tokens 8 --steps 2 2 --minutes "${MINUTES:-2}" --override "${tiny[@]}" || measured=1
fi
exit $(( passed != 0 || measured != 0 ))

#!/usr/bin/env bash
# Run the tests that need a GPU, and the benchmark of all presets, without network and within 10 minutes on one H100:
#
#     scripts/gpu_check.sh OUT        on a GPU
#     scripts/gpu_check.sh OUT cpu    rehearsal on a CPU: the tests that a CPU can run, and tiny networks
#
# OUT gets summary.json, tests.json, gpu_check.log, and for each part of the benchmark a folder with benchmark.json,
# benchmark.md and, with matplotlib, benchmark.png. PYTHON names the interpreter: .venv's if there is one, else python3.
# MINUTES is the limit for everything, 10: each part has a share of what is left, and is ended when it takes longer. A
# part that fails does not keep the next from running. The exit status is 0 only if all tests passed and all parts ended.
set -uo pipefail
if [[ $# -lt 1 || $# -gt 2 || ${2:-cuda} != @(cuda|cpu) ]]; then
    echo "usage: scripts/gpu_check.sh OUT [cpu]" >&2
    exit 2
fi
if [[ ! ${MINUTES:=10} =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "gpu_check.sh: MINUTES is '$MINUTES', but should be an integer from 1 to 9999" >&2
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
systems=(ours plain diffusers deepfloyd)
if "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("imagen_pytorch") is None)'; then
    systems+=(imagen-pytorch)
fi

grace=15 # seconds between the end of a part's time and its being killed
allowed=$((60 * MINUTES - grace))
rm -f "$out/parts.tsv" "$out/tests.xml"
: >"$out/gpu_check.log"
running=
trap 'if [[ -n $running ]]; then kill "$running" 2>/dev/null; fi; exit 130' INT TERM

limit_of() { # the seconds of a part that has a share, in percent, of what is left
    local left=$(((allowed - SECONDS) * $1 / 100))
    echo $((left > 1 ? left : 1))
}

part() { # a name, a limit in seconds, and a command
    local begun=$SECONDS status
    timeout -k "$grace" "$2" "${@:3}" > >(tee -a "$out/gpu_check.log") 2>&1 &
    running=$!
    wait "$running"
    status=$?
    running=
    printf '%s\t%s\t%s\t%s\n' "$1" "$status" $((SECONDS - begun)) "$2" >>"$out/parts.tsv"
}

measure() { # a name of a folder in OUT, a share of what is left, and the options of the benchmark
    local limit minutes
    limit=$(limit_of "$2")
    minutes=$(awk "BEGIN { print 0.8 * $limit / 60 }") # a call that has begun is not interrupted
    part "$1" "$limit" "$PYTHON" scripts/benchmark.py --device "$device" --output_dir "$out/$1" --minutes "$minutes" \
        "${@:3}"
}

# a test run that is ended writes what it has
interruptible='import signal, sys, pytest
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'
selected=(-m gpu tests/test_gpu.py tests/test_gpu_compiled.py)
if [[ $device == cuda ]]; then # and those of diffusers' tester classes
    selected=(-m "gpu or cpu_offload or group_offload or memory" tests/test_gpu.py tests/test_gpu_compiled.py tests/models)
fi
part tests "$(limit_of 40)" "$PYTHON" -c "$interruptible" -v -p no:cacheprovider "${selected[@]}" \
    --junitxml="$out/tests.xml"

if [[ $device == cuda ]]; then
    measure all 75 --what step training stage cascade normalization --presets all --dtype bfloat16 --repeats 20 \
        --systems "${systems[@]}" --attention_backends all --memory_formats channels_last contiguous
    measure compiled 100 --what step --presets 500m_res_64 --dtype bfloat16 --repeats 20 --systems ours compiled \
        --compile blocks
else
    tiny=(sample_size=16 "block_out_channels=(16,32)" layers_per_block=1 "attention_resolutions=(8,)"
        attention_head_dim=8 encoder_hid_dim=16 cross_attention_dim=16 norm_num_groups=4)
    tiny_deepfloyd=(sample_size=16 "block_out_channels=(32,64,64,64)" layers_per_block=1 attention_head_dim=8
        encoder_hid_dim=64)
    measure all 30 --what step training stage normalization --presets emoji_base_64 --repeats 3 --tokens 8 \
        --steps 2 2 --systems "${systems[@]}" --attention_backends all --memory_formats channels_last contiguous \
        --override "${tiny[@]}"
    measure deepfloyd 30 --what step training stage --presets IF-I-M --repeats 3 --tokens 8 --steps 2 2 \
        --systems ours plain deepfloyd --override "${tiny_deepfloyd[@]}"
    measure cascade 40 --what cascade --presets emoji_base_64 emoji_sr_256 --repeats 3 --tokens 8 --steps 1 1 \
        --systems ours
    measure compiled 100 --what step --presets emoji_base_64 --repeats 3 --tokens 8 --systems ours compiled \
        --compile blocks --override "${tiny[@]}"
fi
"$PYTHON" scripts/gpu_check_summary.py "$out"

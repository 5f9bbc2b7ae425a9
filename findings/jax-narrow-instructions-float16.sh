#!/usr/bin/env bash
# JAX on a CPU converts no float16 once XLA may use no instruction beyond SSE4.2.
#
# One would guess: --xla_cpu_max_isa chooses the vector instructions of a program, and every program still compiles, more
# slowly; it is the documented way to try what a narrower processor would do.
# What happens: below AVX the flag takes the conversion instructions of float16 (F16C) away too, and on Linux XLA has no
# functions to put in their place: whatever converts from or to float16 raises an error of LLVM's linker. bfloat16 is
# converted, and arithmetic in float32 works. A virtual processor without F16C does the same without any flag.
# What helps: AVX is the narrowest value that keeps float16; or compute in bfloat16 or float32.
#
# Versions: jax 0.10.2 and jaxlib 0.10.2 (shown here); jax 0.12.0.1 on Python 3.13 does the same.
# Sources: https://github.com/openxla/xla/issues/6787 (a virtual machine without F16C);
# https://github.com/openxla/xla/pull/21903 and pull/46823, which give these functions to macOS and s390x alone.
#
# Output seen:
#   AVX:    float32 yes, bfloat16 yes, float16 yes
#   SSE4_2: float32 yes, bfloat16 yes, float16 JaxRuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat > ask.py <<'PY'
import jax
import jax.numpy as jnp

answers = []
for name in ("float32", "bfloat16", "float16"):
    try:
        converted = jax.jit(lambda x: (x.astype(name) * 2).astype("float32"))(jnp.arange(4.0))
        answers.append(f"{name} {'yes' if (converted == 2 * jnp.arange(4.0)).all() else 'wrong'}")
    except jax.errors.JaxRuntimeError as error:
        answers.append(f"{name} {type(error).__name__}")
print(", ".join(answers))
PY
seen=$(for isa in AVX SSE4_2; do
    printf '%-7s ' "$isa:"
    JAX_PLATFORMS=cpu XLA_FLAGS="--xla_cpu_max_isa=$isa" env/bin/python ask.py 2> errors.log
done)
echo "$seen"
expected='AVX:    float32 yes, bfloat16 yes, float16 yes
SSE4_2: float32 yes, bfloat16 yes, float16 JaxRuntimeError'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }

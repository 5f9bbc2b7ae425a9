#!/usr/bin/env bash
# Keras' MultiHeadAttention with a seeded initializer begins with equal query, key and value kernels.
#
# One would guess: a seed makes a layer reproducible, and its kernels are still drawn independently.
# What happens: the layer gives each projection a copy of the initializer, made from its configuration. A copy with the same
# integer seed draws the same values, so projections of equal shape begin equal: scores are symmetric, and each position
# prefers itself. A SeedGenerator, which the documentation recommends for different values at each call, is copied in its
# first state and so does not help. Without a seed each copy draws anew.
# What helps: no seed in the initializer, and keras.utils.set_random_seed for reproducible runs.
#
# Versions: keras 3.15.1 on jax 0.10.2.
# Sources: MultiHeadAttention._get_common_kwargs_for_sublayer in keras/src/layers/attention/multi_head_attention.py, and
# the documentation of `seed` in keras/src/initializers/random_initializers.py.
#
# Output seen:
#   no seed:       query and key differ, query and value differ
#   seed=1:        query and key equal, query and value equal
#   SeedGenerator: query and key equal, query and value equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet keras==3.15.1 jax==0.10.2 jaxlib==0.10.2
cat > ask.py <<'PY'
import keras
import numpy

for name, seed in (("no seed", None), ("seed=1", 1), ("SeedGenerator", keras.random.SeedGenerator(1))):
    initializer = keras.initializers.GlorotUniform(seed=seed)
    layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4, kernel_initializer=initializer)
    x = numpy.ones((1, 3, 8), "float32")
    layer(x, x)
    kernels = {weight.path.split("/")[-2]: numpy.asarray(weight) for weight in layer.weights if weight.path.endswith("kernel")}
    query, key, value = (kernels[name] for name in ("query", "key", "value"))
    says = ["equal" if (query == other).all() else "differ" for other in (key, value)]
    print(f"{name + ':':14} query and key {says[0]}, query and value {says[1]}")
PY
seen=$(KERAS_BACKEND=jax JAX_PLATFORMS=cpu env/bin/python ask.py 2> errors.log)
echo "$seen"
expected='no seed:       query and key differ, query and value differ
seed=1:        query and key equal, query and value equal
SeedGenerator: query and key equal, query and value equal'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }

#!/usr/bin/env bash
# GPT-125M as in Table 1 of FP8-LM (arXiv:2310.18313): 2,048 tokens a sequence, about 1 M tokens a step, peak learning
# rate 6e-4 after 1,000 steps of warm-up, a cosine to a tenth, 100 B tokens in all. One node of GPUs.
#
#   DATA='text/**/*.txt' TOKENIZER=tokenizer.json launchers/recipes/gpt125m_1node.sh [settings...]
#
# MICRO_BATCHES sets how many sequences a GPU holds at once: 512 / (GPUs * MICRO_BATCHES). Every rank holds the tokens in
# memory, two bytes each; --steps shortens the run for a smaller text. Not yet run to its end: no result is claimed.
set -euo pipefail

: "${DATA:?the text to train on: a file, a folder or a glob}"
: "${TOKENIZER:?a Hugging Face tokenizer.json of at most 50,304 tokens, such as the one of GPT-2}"
LEVEL=${LEVEL:-O2}
MICRO_BATCHES=${MICRO_BATCHES:-8}

torchrun --standalone --nproc-per-node gpu -m msamp_like.launchers.pretrain \
    --preset 125M --level "$LEVEL" --data "$DATA" --tokenizer "$TOKENIZER" --out "${OUT:-runs/125M-$LEVEL}" \
    --steps 95367 --warmup-steps 1000 --batch-size 512 --micro-batches "$MICRO_BATCHES" --compile \
    --eval-every 1000 --save-every 1000 "$@"

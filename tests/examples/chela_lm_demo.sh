#!/bin/sh
# chela_lm_demo.sh <chela_lm>: the demo ends with its figures, keeps to its time, and leaves a model that can be used.
set -eu
program=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
fail() { echo "$*"; exit 1; }

mkdir -p text/below
seq 1 4000 > text/a
seq 9000 12000 > text/below/b
"$program" demo --text text --seconds 2 --layers 1 --width 32 --heads 1 --key-dim 16 --value-dim 16 --hidden 32 \
  --kernel-length 16 --batch 4 --context 64 --bytes 400 > out 2> log || fail "failed: $(cat log)"
number='[0-9][0-9]*\.*[0-9]*'
tail -n 1 out | grep -q "^RESULT train_seconds=$number tokens_per_second=$number heldout_bits_per_byte=$number\
 trigram_bits_per_byte=$number unigram_bits_per_byte=$number\$" || fail "unexpected last line: $(tail -n 1 out)"
grep -q '^step' log || fail "no progress: $(cat log)"
"$program" eval --text text --checkpoint chela_lm_demo.safetensors > eval.out
bits=$(tail -n 1 out | sed 's/.*heldout_bits_per_byte=//; s/ .*//')
grep -q "^RESULT bits_per_byte=$bits " eval.out || fail "the demo said $bits, eval says $(cat eval.out)"

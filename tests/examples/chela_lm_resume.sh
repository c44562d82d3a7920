#!/bin/sh
# chela_lm_resume.sh <chela_lm>: a run broken off by signals and resumed ends in the same bytes as an unbroken one, whatever the
# number of threads.
set -eu
program=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
fail() { echo "$*"; exit 1; }

seq 1 20000 > text
settings="--text text --steps 1500 --layers 2 --width 32 --heads 2 --key-dim 8 --value-dim 8 --hidden 32
  --kernel-length 16 --batch 4 --context 64 --seed 5"
# shellcheck disable=SC2086
"$program" train $settings --threads 1 --checkpoint whole > whole.out 2> whole.log || fail "the unbroken run failed: $(cat whole.log)"

# run_until_signalled <signal> <argument>...: sends the signal once the run shows progress, and expects the exit code of Ctrl-C.
run_until_signalled() {
  signal=$1
  shift
  "$program" train "$@" --checkpoint pieces > pieces.out 2> pieces.log &
  process=$!
  while ! grep -q '^step' pieces.log; do
    kill -0 $process || fail "the run ended early: $(cat pieces.log)"
    sleep 0.02
  done
  kill -s "$signal" $process
  status=0
  wait $process || status=$?
  [ $status -eq 130 ] || fail "exit code $status after SIG$signal, expected 130: $(cat pieces.log)"
  grep -q 'go on with: chela_lm train --resume --checkpoint pieces' pieces.log || fail "no way to resume: $(cat pieces.log)"
}
# shellcheck disable=SC2086
run_until_signalled INT $settings --threads 2
cp pieces first_piece
run_until_signalled TERM --resume --text text
cmp -s pieces first_piece && fail "the resumed run did nothing"
"$program" train --resume --text text --checkpoint pieces --save-seconds 0.1 > pieces.out 2> pieces.log
tail -n 1 pieces.out | grep -q '^RESULT .*steps=1500 ' || fail "unexpected last line: $(tail -n 1 pieces.out)"
cmp whole pieces || fail "the resumed run differs from the unbroken one"
[ "$(find . -name '*.tmp*' | wc -l)" -eq 0 ] || fail "temporary files were left behind"

# On a text shorter than a window, the pass over the window and the decoding step by step predict alike.
head -c 60 text > short
windowed=$("$program" eval --checkpoint whole --text short --part all | sed 's/.* bits_per_byte=//; s/ .*//')
stateful=$("$program" eval --checkpoint whole --text short --part all --stateful | sed 's/.* bits_per_byte=//; s/ .*//')
[ -n "$windowed" ] && [ "$windowed" = "$stateful" ] || fail "windowed $windowed, stateful $stateful bits per byte"

"$program" generate --checkpoint whole --prompt 123 --bytes 50 > one 2> one.log
"$program" generate --checkpoint whole --prompt 123 --bytes 50 > two 2> /dev/null
cmp one two || fail "the same seed wrote something else"
[ "$(wc -c < one)" -eq 53 ] || fail "wrote $(wc -c < one) bytes, expected 53"
tail -n 1 one.log | grep -q '^RESULT bytes=50 ' || fail "unexpected last line: $(tail -n 1 one.log)"

#!/bin/sh
# chela_lm_errors.sh <chela_lm>: whatever is wrong is said in one line, and no file is lost.
set -eu
program=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
fail() { echo "$*"; exit 1; }

seq 1 3000 > text
: > empty
mkdir empty_folder folder
echo inside > folder/file
small="--layers 1 --width 16 --heads 1 --key-dim 8 --value-dim 8 --hidden 16 --kernel-length 8 --batch 2 --context 32"
# shellcheck disable=SC2086
"$program" train --text text --steps 3 $small --checkpoint model 2> /dev/null > /dev/null
cp model kept
head -c 2000 model > cut
sed 's/"F32"/"F64"/' model > other_type

# refused <words> <argument>...: the program must fail with one line that starts with its name and holds the words.
refused() {
  words=$1
  shift
  status=0
  "$program" "$@" > out 2> log || status=$?
  [ $status -ne 0 ] || fail "not refused: $*"
  [ $status -lt 126 ] || fail "exit code $status: $*"
  [ "$(wc -l < log)" -eq 1 ] || fail "$*: more than one line: $(cat log)"
  grep -q "^chela_lm: .*$words" log || fail "$*: expected '$words': $(cat log)"
}
refused "subcommand"
refused "not recognized\|not expected\|were not expected" train --no-such-flag
refused "steps" train --steps many
refused "no such file" train --text missing --checkpoint new
refused "empty" train --text empty --checkpoint new
refused "no text" train --text empty_folder --checkpoint new
refused "too short" train --text folder --checkpoint new
refused "batch" train --text text --checkpoint new --batch 0
refused "neither a file nor a folder" train --text /dev/null --checkpoint new
refused "exists" train --text text --checkpoint model
refused "No such file" train --text text --checkpoint missing/new
refused "folder" train --text text --checkpoint folder --overwrite
refused "resume" train --text text --resume --layers 4 --checkpoint model
refused "1 to 65536" train --text text --layers 0 --checkpoint new
refused "1 to 65536" train --text text --width 1000000000000 --checkpoint new
refused "learning rate" train --text text --learning-rate -1 --checkpoint new
refused "cannot open" train --text text --resume --checkpoint missing
refused "header" train --text text --resume --checkpoint text
refused "cut short" train --text text --resume --checkpoint cut
refused "F64" eval --text text --checkpoint other_type
refused "cannot open" eval --text text --checkpoint missing
refused "too short" eval --text folder/file --checkpoint model --part held-out
refused "cannot open" generate --checkpoint missing
refused "prompt" generate --checkpoint model --prompt ""
[ ! -e new ] || fail "a refused run left a file"
cmp model kept || fail "a refused run changed the checkpoint"

# A reader that goes away is an error like any other.
{ status=0; "$program" generate --checkpoint model --bytes 100000 2> log || status=$?; echo $status > code; } | head -c 1 > /dev/null
[ "$(cat code)" -eq 1 ] || fail "exit code $(cat code) at a closed pipe"
grep -q '^chela_lm: cannot write to standard output' log || fail "at a closed pipe: $(cat log)"

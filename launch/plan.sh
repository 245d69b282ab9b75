# Sourced by the scripts that start a run elsewhere: reads their flags, and prints or runs the commands they plan.
# A script lists its flags as "name|default|meaning" in `flags`; a default of ! must be given, one of false is a switch.
# shellcheck disable=SC2154,SC2034 # the flags become variables by name, and the scripts read what is set here
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  local row flag default meaning
  printf '%s\n\nflags (--name=value, or the environment variable in brackets):\n' "$about"
  for row in "${flags[@]}"; do
    IFS='|' read -r flag default meaning <<<"$row"
    case $default in
      !) default="; required" ;;
      '') ;;
      *) default="; default $default" ;;
    esac
    printf '  --%-16s %s [%s%s]\n' "$flag" "$meaning" "$(variable "$flag")" "$default"
  done
  printf '  --%-16s %s\n' dry_run "print what would be done, do nothing" help "print this"
  printf '  %-18s %s\n' -- "what follows is passed on to maskrl_jax.main"
}

variable() { printf 'MASKRL_%s' "$1" | tr '[:lower:]' '[:upper:]'; }

# Set a variable for every flag: from --name=value, else from the environment, else the default; and dry_run and more.
read_flags() {
  local _row _flag _default _from _known=" "
  dry_run=false more=()
  for _row in "${flags[@]}"; do
    IFS='|' read -r _flag _default _ <<<"$_row"
    _from=$(variable "$_flag")
    printf -v "$_flag" '%s' "${!_from:-$_default}"
    _known+="$_flag "
  done
  while [ $# -gt 0 ]; do
    _flag=${1#--} _flag=${_flag%%=*}
    case $1 in
      --) shift && more=("$@") && break ;;
      --help) usage && exit ;;
      --dry_run) dry_run=true ;;
      --help=* | --dry_run=*) fail "--$_flag takes no value" ;;
      --*)
        [[ $_known == *" $_flag "* ]] || fail "unknown flag --$_flag; see --help"
        if [[ $1 == *=* ]]; then
          printf -v "$_flag" '%s' "${1#*=}"
        elif [[ ${!_flag} == true || ${!_flag} == false ]]; then
          printf -v "$_flag" true
        else
          fail "--$_flag needs a value: --$_flag=..."
        fi
        ;;
      *) fail "unexpected '$1'; see --help" ;;
    esac
    shift
  done
  for _row in "${flags[@]}"; do
    IFS='|' read -r _flag _default _ <<<"$_row"
    [[ ${!_flag} != ! && ($_default != ! || -n ${!_flag}) ]] || fail "give --$_flag=... or set $(variable "$_flag")"
    [[ $_default != false || ${!_flag} == true || ${!_flag} == false ]] || fail "--$_flag is true or false"
  done
}

# A number as decimal digits that the shell's arithmetic can hold and does not take for octal.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }

notes=() # what is said beside the plan, once the flags are found good

say_notes() { [ ${#notes[@]} -eq 0 ] || printf 'note: %s\n' "${notes[@]}" >&2; }

needs() { command -v "$1" >/dev/null || fail "there is no $1 here; $2"; }

# The name of the run, if it is not given that of its config.
settle_name() {
  local stem=${config##*/}
  [ -n "$name$config" ] || fail "say which run: give --name=... or the --config=... that it was started with"
  [ -n "$name" ] || name=$(printf '%s' "${stem/.py/}" | tr '_:' '-')
  [[ $name =~ ^[a-z][-a-z0-9]{0,38}[a-z0-9]$ ]] ||
    fail "name '$name' must be 2 to 40 of a-z, 0-9 and -, begin with a letter, not end with -; give another --name"
}

# What `delete` needs: the name, and nothing for the run.
settle_end() {
  settle_name
  [ ${#more[@]} -eq 0 ] || fail "delete takes no flags of maskrl_jax.main"
}

# The config's file must exist; what is not given of name, workdir and store follows from it and from the bucket.
# `settle_run here`: for this disk; elsewhere: for machines that do not see it; archive: which also get the last commit.
settle_run() {
  local file=${config%%:*} runs=runs word
  [ -n "$config" ] || fail "give --config=..., that of the run"
  [ -f "$file" ] || fail "there is no config '$file'"
  settle_name
  if [ -n "${bucket:-}" ]; then
    bucket=${bucket#gs://} bucket=${bucket%/}
    [[ $bucket =~ ^[a-z0-9][a-z0-9._-]+[a-z0-9]$ ]] || fail "'$bucket' is no name of a bucket"
    runs="gs://$bucket/runs"
  fi
  workdir=${workdir:-$runs/$name} store=${store:-$runs/stages}
  startup=runs/launch/$name.sh
  if [ "$1" != here ]; then
    for word in workdir store; do
      [[ ${!word} == gs://* ]] || fail "$word '${!word}' is none that the machines can write to; they need gs://..."
    done
    [[ $file != /* && /$file/ != */../* ]] || fail "config $file must be a path inside the repository"
    [ "$1" != archive ] || check_committed "$file"
  fi
  for word in ${more[@]+"${more[@]}"}; do
    case ${word#-} in
      -distributed | -distributed=*) fail "leave out --distributed; the run has it where it needs it" ;;
      -config | -config=* | -workdir | -workdir=* | -store | -store=*) fail "give ${word%%=*} before the --" ;;
    esac
  done
  run=("--config=$config" "--workdir=$workdir" "--store=$store" ${more[@]+"${more[@]}"})
  [[ "${run[*]}" != *[[:cntrl:]]* ]] || fail "a flag has a line break or another control character in it"
}

check_committed() {
  if ! git rev-parse --quiet --verify HEAD >/dev/null 2>&1; then
    $dry_run || fail "there is no git commit here, which the machines would get; clone the repository"
    notes+=("there is no git commit here, which the machines would get")
    return 0
  fi
  git cat-file -e "HEAD:./$1" 2>/dev/null ||
    fail "config $1 is not in the last commit, which the machines get; commit it"
  [ -z "$(git status --porcelain -- .)" ] ||
    notes+=("the machines get the last commit, without the changes made since")
}

# Set topology, chips, chips_per_host and hosts, which must go with the type.
count_hosts() {
  local default=4x4 known='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16' larger=''
  case $type in
    v5p) default=2x2x4 known='2x2x1 2x2x2 2x2x4 2x4x4' ;;
    tpu7x) default=2x2x4 known='1x1x1 2x2x1 2x2x2 2x2x4 2x4x4' ;;
  esac
  [ $default = 4x4 ] || larger=', and sides of 4, 8, 12, ... that do not fall, such as 4x8x12'
  topology=${topology:-$default}
  if [[ ! $topology =~ ^[0-9]+(x[0-9]+)+$ ]] ||
    [[ " $known " != *" $topology "* && (-z $larger || $(are_fours "${topology//x/ }") != yes) ]]; then
    fail "$type has no topology '$topology'; it has ${known// /, }$larger"
  fi
  chips=$((${topology//x/*}))
  chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
  case $chips_per_host:$topology in
    1:1x1 | 1:1x1x1 | 8:2x4 | 4:[!1]* | 4:1[0-9]*) ;;
    *) fail "a $type slice of $topology has no hosts of '$chips_per_host' chips; leave out --chips_per_host" ;;
  esac
  hosts=$((chips / chips_per_host))
}

# "yes" for three multiples of 4, none less than the one before, of no more chips than any slice has.
are_fours() {
  local least=4 count=0 product=1 side
  for side in $1; do
    is_number "$side" && [ "$side" -lt 1000 ] && [ $((side % 4)) -eq 0 ] && [ "$side" -ge "$least" ] || return 0
    least=$side count=$((count + 1)) product=$((product * side))
  done
  [ $count -ne 3 ] || [ $product -gt 9216 ] || echo yes
}

# Names of Google Cloud; an empty one passes where the flag may be left out.
check_cloud() {
  [[ $project =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    fail "project '$project' is no id of a project, like my-project"
  [[ ${service_account:-a@b} =~ ^(default|[a-zA-Z0-9._-]+@[a-zA-Z0-9.-]+)$ ]] ||
    fail "service_account '$service_account' is not like run@project.iam.gserviceaccount.com"
  [[ $zone =~ ^[a-z]+-[a-z0-9]+-[a-z0-9]+$ ]] || fail "zone '$zone' is not like us-east5-b"
  region=${zone%-*}
}

# One word as the shell reads it back.
quoted() {
  if [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//\'/\'\\\'\'}"
  fi
}

# Words on one line.
words() {
  local word space=''
  for word in "$@"; do
    printf '%s' "$space" && quoted "$word"
    space=' '
  done
}

# A command, each of its flags on a line of its own.
command_line() {
  local word space='' last=''
  for word in "$@"; do
    [[ $word != --* && $last != --* ]] || space=$' \\\n  '
    printf '%s' "$space" && quoted "$word"
    space=' ' last=$word
  done
  echo
}

# Let a planned command fail.
or_not() { sed '$s/$/ || true/'; }

# The file that is the startup script of TPU machines, of a managed instance group if there is one, and their code.
startup_and_code() {
  local archive=runs/launch/$name.tar.gz code="gs://$bucket/code/$name.tar.gz"
  echo 'mkdir -p runs/launch'
  echo "cat >$startup <<'STARTUP'"
  printf '%s\n' '#!/usr/bin/env bash' "code=$(quoted "$code")" "run=($(words "${run[@]}"))" \
    "group=$1" "zone=$zone" "hosts=${hosts:-}"
  sed 1d launch/tpu_host.sh
  echo STARTUP
  echo "git archive --format=tar.gz --output=$archive HEAD"
  echo "gcloud storage cp $archive $code"
}

# Print what `plan` plans, or do it, for which a tool is needed.
finish() {
  local commands
  say_notes
  commands=$(plan)
  if $dry_run; then
    printf '%s\n' "$commands"
  else
    needs "$1" "see docs/launch.md, or look at --dry_run"
    bash -euo pipefail -c "$commands"
  fi
}

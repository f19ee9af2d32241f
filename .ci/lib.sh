# Shared by .ci/run and .ci/long/*; sourced, never run.
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }

# A clean clone at $1, of $commit or of HEAD.
clone() {
    git clone --quiet --no-checkout "$top" "$1"
    git -C "$1" checkout --quiet --detach "${commit:-$(git -C "$top" rev-parse HEAD)}"
}

# Prints a working interpreter of version $1 (such as 3.12), or fails. A shim may be there and still not run.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/"python$1" \
        /usr/bin/"python$1" /usr/local/bin/"python$1" /opt/python*/bin/"python$1"; do
        if "$candidate" -V >/dev/null 2>&1 && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

# A new virtual environment at $1, of interpreter $2, with a pip that knows dependency groups.
new_venv() {
    "${2:-python3}" -m venv "$1"
    "$1/bin/pip" install --quiet --upgrade pip
}

# What every leg needs: git, compilers for C and C++, Python with venv and headers. Installed by apt where we may.
need_tools() {
    local missing=()
    command -v git >/dev/null || missing+=(git)
    printf 'int main(void){return 0;}' | cc -x c -o /dev/null - 2>/dev/null || missing+=(gcc libc6-dev)
    printf '#include <map>\nint main(){return 0;}' | c++ -x c++ -o /dev/null - 2>/dev/null || missing+=(g++)
    if ! python3 - 2>/dev/null <<'PY'
import ensurepip, os, sysconfig, venv
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
    then
        missing+=(python3 python3-venv python3-dev)
    fi
    [ ${#missing[@]} -eq 0 ] || install_tools "${missing[@]}"
}

# What some tests want, and skip without: a browser for the report, valgrind for the budgets. $1: where to note it.
want_tools() {
    local missing=()
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
        missing+=(chromium)
    command -v valgrind >/dev/null || missing+=(valgrind libc6-dbg)
    [ ${#missing[@]} -eq 0 ] || install_tools "${missing[@]}" ||
        echo "${missing[*]}: cannot be installed, what needs them was not run" >>"$1"
}

install_tools() {
    say "installing $*"
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "cannot install them: not root, or no apt-get" >&2
        return 1
    fi
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# Builds the clone at $1 in place with ASan and UBSan, in the environment $2; sanitized_pytest then runs in it.
build_sanitized() {
    new_venv "$2"
    (cd "$1" && CFLAGS=-O1 S2SHADOW_CHECKED=1 S2SHADOW_SANITIZE=address,undefined \
        "$2/bin/pip" install --quiet --editable ".[cli,plot]" --group test)
}

sanitized_pytest() {
    local venv=$1
    shift
    # Python itself leaks by design; pymalloc would hide overruns from ASan; a refused malloc must return NULL.
    # ASan looks for what throws C++ exceptions when it starts, long before a module brings libstdc++ along.
    LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:halt_on_error=1 \
        UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
        "$venv/bin/python" -m pytest --capture=sys "$@"
}

# Whether ThreadSanitizer works here; sets "beside" to what programs must be run by for that. It knows few layouts of an
# address space, and where the kernel scatters more it needs them as they are without.
have_tsan() {
    local probe
    probe=$(mktemp -d)
    beside=()
    if ! printf 'int main(void){return 0;}' | cc -fsanitize=thread -x c -o "$probe/probe" - 2>/dev/null; then
        rm -rf "$probe"
        return 1
    fi
    "$probe/probe" 2>/dev/null || beside=(setarch "$(uname -m)" -R)
    local code=0
    ${beside[@]+"${beside[@]}"} "$probe/probe" 2>/dev/null || code=1
    rm -rf "$probe"
    return "$code"
}

# Builds the clone at $1 in place, in the environment $2, and the thread driver in it; S2SHADOW_SANITIZE=thread, where it
# is set, counts for both.
build_threads() {
    new_venv "$2"
    (cd "$1" && ${S2SHADOW_SANITIZE:+env CFLAGS=-O1} "$2/bin/pip" install --quiet --editable .)
    threads_make "$1" "$2" CFLAGS="-O2 -g ${S2SHADOW_SANITIZE:+-fsanitize=$S2SHADOW_SANITIZE}" driver
}

threads_make() {
    local clone=$1 venv=$2
    shift 2
    # where the header is cannot be asked: Python by itself cannot load modules that need TSan's runtime
    PYTHONPATH=$clone make -s -C "$clone/tests/threads" PYTHON="$venv/bin/python" S2SHADOW="-I$clone/s2shadow/include" "$@"
}

# Runs the driver of a clone: CLONE VENV OPTIONS. Under TSan, what it reports makes the exit code 66.
run_threads() {
    local clone=$1 venv=$2
    shift 2
    TSAN_OPTIONS=exitcode=66:second_deadlock_stack=1 \
        threads_make "$clone" "$venv" WRAPPER="nice -n 19 ${beside[*]-}" ARGS="$*" run
}

# TSan must see races that are made on purpose: one of the driver alone, and one both sides of which are in the engine.
see_races() {
    local where=$1 what
    for what in "driver count_unguarded" "engine api_tlbi" "engine vcpu_load"; do
        if run_threads "$1" "$2" --race "${what% *}" >"$where/race.log" 2>&1 ||
            ! grep -q 'ThreadSanitizer: data race' "$where/race.log" || ! grep -q "${what#* }" "$where/race.log"; then
            cat "$where/race.log"
            echo "ThreadSanitizer does not see a race that is there: ${what#* }" >&2
            return 1
        fi
    done
    echo "races made on purpose are seen, in the driver and in the engine"
}

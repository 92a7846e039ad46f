#!/usr/bin/env bash
# distributed 2026.8.0: after Client(address, set_as_default=False) has raised ValueError or TypeError, the process takes
# a minute to end.
#
# `Client` closes itself if it cannot connect with an OSError, but not after other errors. Such errors come from a
# mistyped address, from a tls:// address without certificates (TypeError), or from a scheduler without TLS behind a
# tls:// address ("IOStream is not idle; cannot convert to SSL"). The client that is default is closed by `atexit`.
# Another one is deleted at the end of the process, when its event loop no longer runs. `__del__` waits for the loop,
# twice the 30 s of timeouts.connect, and prints a traceback.
#
# Expected: the ValueError, and then the end of the process, as without set_as_default=False.
# Seen:
#   set_as_default=True: ValueError, ended at once
#   set_as_default=False: ValueError, ended after 60 s, TimeoutError
#
# What helps: connect once with `distributed.comm.connect` before the client is made. It raises the same errors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check dask==2026.8.0 distributed==2026.8.0
cd "$folder"
for default in True False; do
    start_s=$SECONDS
    "$folder/venv/bin/python" -c "from distributed import Client
Client('tcp://127.0.0.1:http', set_as_default=$default)" 2>errors || true
    end=$([ $((SECONDS - start_s)) -lt 60 ] && echo "at once" || echo "after 60 s")
    echo "set_as_default=$default: $(grep -o '^ValueError' errors), ended $end$(grep -o '^TimeoutError' errors | sed 's/^/, /')"
done | tee seen
diff seen - <<'EXPECTED'
set_as_default=True: ValueError, ended at once
set_as_default=False: ValueError, ended after 60 s, TimeoutError
EXPECTED

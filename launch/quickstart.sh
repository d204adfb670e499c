#!/usr/bin/env bash
# From nothing to a trained, evaluated and exported PolaFormer++ b0:
#
#   bash launch/quickstart.sh                                  on Fashion-MNIST, 10 classes
#   bash launch/quickstart.sh --data FOLDER [key=value …]      on your own images: FOLDER/class/image, or the same below
#                                                              FOLDER/train and FOLDER/val; also a zip or tar
#
# The options of `python -m dataio.pack`, such as --skip-broken and --resize 256, work with --data.
seconds=$SECONDS
called_from=$PWD
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
apt_install dataset-fashion-mnist
echo "starting the quickstart: loading PyTorch"
exec python -m launch.quickstart --setup-seconds $((SECONDS - seconds)) --called-from "$called_from" "$@"

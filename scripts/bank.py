"""Work with finished banks: `python scripts/bank.py info | add | remove | merge | apply | export ...` (docs/bank.md).

python scripts/bank.py info bank=<folder> [class=<name>] [json=true]
python scripts/bank.py add bank=<folder> images=<folder> [tags=<names or label file>] [new=<names>] [out=<folder>]
python scripts/bank.py remove bank=<folder> [class=<names>] [image=<ids>] [region=<rows>] [out=<folder>]
python scripts/bank.py merge banks=[<folder>,<folder>] [prefix=true] [out=<folder>]
python scripts/bank.py apply bank=<folder> corrections=<file> [out=<folder>]
python scripts/bank.py export bank=<folder> out=<folder> [format=npz|faiss|csv|projector]
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("bank")

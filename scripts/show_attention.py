"""Draw where a text-to-image model sees words: `python scripts/show_attention.py image=<file> words='dog;grass'
pseudo_masks=iseg_voc [out=<PNG>] [key=value ...]` (docs/siblings.md).
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("show_attention")

"""Label your own images: `python scripts/predict.py bank=<folder> images=<folder or files> [key=value ...]`.

Keys: out=<folder>, min_score=<cosine>, formats=[png,overlay,coco,labelme,labelstudio], objects=proposals|components,
tolerance=<pixels>, image_url=<prefix>, labelstudio_root=<folder>; and overrides such as retrieval.top_k=3
(docs/bank.md).
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("predict")

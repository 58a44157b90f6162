"""What every stage needs: batches and resume, artefact folders, shards and peers."""

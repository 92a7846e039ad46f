"""Operations of a pipeline: batch in, batch out."""

"""What comes out of a run: a merged model, a score, an answer, a page."""

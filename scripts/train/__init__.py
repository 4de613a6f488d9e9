"""What scripts/train_demo.py is made of: corpus, model, loop, export, evaluation."""

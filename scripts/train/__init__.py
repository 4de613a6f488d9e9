"""What scripts/train_demo.py and train_eagle3.py are made of: corpus, models, loop, export, evaluation."""

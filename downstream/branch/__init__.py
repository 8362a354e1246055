"""Fine-grained recognition: attention branch network, attention mining branch, and maps that supervise them."""

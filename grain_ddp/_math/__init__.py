"""Mathematics: the Gramian, the rules that give weights, the record. No torch.distributed."""

"""Adapters out to the world of Hugging Face PEFT, and in again.

What comes in is a tree with adapters and a map, which says which PyTorch module each of
its weights is; or a folder, the same map and a plain tree. What goes out is a folder
that PEFT and vLLM load, or a tree with adapters. The wing knows trees and files: no
jaxpr.

Read in this order:

  names.py     which PyTorch modules a weight is: the map
  modules.py   one weight's adapter as those of its modules, there and back
  layouts.py   how PyTorch keeps each leaf, and the keys of its tensors
  plan.py      which modules the leaves that train are: made once, for both ways
  config.py    PEFT's adapter_config.json
  folder.py    a folder, written whole or not at all
  checks.py    what PEFT or vLLM would not load as it was meant
  export.py    `export_peft`
  parts.py     the tensors of a folder, each sorted to its leaf
  import_.py   `import_peft`

And the map, read off the checkpoint that the model was made from:

  checkpoint.py  a checkpoint of PyTorch's, read tensor by tensor
  proofs.py      which tensors a weight is, in every value
  nearest.py     what a weight is like that is no tensor
  twins.py       equal tensors, told apart by names
  patterns.py    a map with stars where layers repeat
  find.py        `find_names`
"""

"""Adapters out to the world of Hugging Face PEFT, and in again.

What comes in is a tree with adapters and a map, which says which PyTorch module each of
its weights is; or a folder, the same map and a plain tree. What goes out is a folder
that PEFT and vLLM load, or a tree with adapters. The wing knows trees and files: no
jaxpr.

Read in this order:

  names.py     which PyTorch modules a weight is: the map
  modules.py   one weight's adapter as those of its modules, there and back
  tensor_keys.py   how PyTorch keeps each leaf, and the keys of its tensors
  module_plan.py      which modules the leaves that train are: made once, for both ways
  peft_config.py    PEFT's adapter_config.json
  peft_folder.py    a folder, written whole or not at all
  export_checks.py    what PEFT or vLLM would not load as it was meant
  export_peft.py    `export_peft`
  sort_tensors.py     the tensors of a folder, each sorted to its leaf
  import_peft.py   `import_peft`

And the map, read off the checkpoint that the model was made from:

  checkpoint.py  a checkpoint of PyTorch's, read tensor by tensor
  match_tensors.py      which tensors a weight is, in every value
  closest_tensor.py     what a weight is like that is no tensor
  equal_tensors.py       equal tensors, told apart by names
  name_patterns.py    a map with stars where layers repeat
  find_names.py        `find_names`
"""

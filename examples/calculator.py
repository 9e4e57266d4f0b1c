"""A calculator for the model, as a function for `rollout.multi_turn`.

Where the model ends its turn with `<calc>12 * (3 + 4)</calc>`, the value is handed to it and it goes on:

    rollout:
      multi_turn: {function: examples/calculator.py:calculator, max_assistant_turns: 4}

Tell the model so in `data.system_prompt`. A chat model is answered with a message of the role `tool`; set
`kwargs: {role: user}` where its chat template knows no tools, or `role: null` for plain text behind what it wrote.
"""

import ast
import operator
import re

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip


def calculator(turn, role="tool"):
    """The value of the last `<calc>..</calc>` of the turn; None, which ends the response, where there is none."""
    asked = re.findall(r"<calc>(.*?)</calc>", turn.text, re.DOTALL)
    if not asked:
        return None
    try:
        value = f"{evaluate(ast.parse(asked[-1].strip(), mode='eval').body):g}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError) as error:
        value = f"error: {error}"
    return f" = {value}\n" if role is None else {"role": role, "content": value}


def evaluate(node):
    """Numbers, + - * / and brackets, and nothing else that Python could do."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.operand))
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")

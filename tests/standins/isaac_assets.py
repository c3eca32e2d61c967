"""Write stand-ins for what Isaac Lab 3.0's velocity and reorientation tasks load, to run these without NVIDIA's asset server.

    python tests/standins/isaac_assets.py assets
    ISAACSIM_ASSET_ROOT=assets python trudi_isaaclab.py --env-id Isaac-Velocity-Flat-G1 --preset cpu

Robots are made of boxes. Their links and joints have the right names, so observations and actions have the right sizes; all
else is made up, and nothing learned on them means anything. They are for the Newton backend; writing them needs no package."""

import json
import pathlib
import sys

# Chains of the left side: the link before, links, the first's place and the step to the next in metres, axes of the joints.
G1 = [
    ("pelvis", "hip_pitch hip_roll hip_yaw knee ankle_pitch ankle_roll", (0, 0.08, -0.1), (0, 0, -0.12), "YXZYYX"),
    ("torso_link", "shoulder_pitch shoulder_roll shoulder_yaw elbow_pitch elbow_roll", (0, 0.15, 0.1), (0, 0, -0.06), "YXZYX"),
    ("left_elbow_roll_link", "zero one two", (0.06, 0, 0), (0.03, 0, 0), "YZZ"),
    ("left_elbow_roll_link", "three four", (0.06, 0.03, 0), (0.03, 0, 0), "ZZ"),
    ("left_elbow_roll_link", "five six", (0.06, -0.03, 0), (0.03, 0, 0), "ZZ")]
H1 = [
    ("pelvis", "hip_yaw hip_roll hip_pitch knee ankle", (0, 0.12, -0.17), (0, 0, -0.2), "ZXYYY"),
    ("torso_link", "shoulder_pitch shoulder_roll shoulder_yaw elbow", (0, 0.2, 0.2), (0, 0, -0.1), "YXZY")]
FINGER = "knuckle proximal middle distal"
SHADOW = {"ff": FINGER, "mf": FINGER, "rf": FINGER, "lf": "metacarpal " + FINGER, "th": "base proximal hub middle distal"}
BOXES = {  # part of a link's name: half the sides of its box in metres, its mass in kilograms
    "torso_link": ((0.08, 0.1, 0.12), 8), "ankle_roll_link": ((0.1, 0.03, 0.02), 1), "ankle_link": ((0.12, 0.04, 0.03), 1),
    "palm": ((0.05, 0.05, 0.01), 0.4), "rh_": ((0.01, 0.01, 0.01), 0.05), "_link_": ((0.01, 0.01, 0.01), 0.05)}
OTHER = ((0.03, 0.03, 0.03), 1)  # the box of the other links, which touches nothing


def humanoid(table, ending):
    """Chains of both sides and a torso, with the names of their joints, which end in `ending`."""
    yield "pelvis", ["torso_link"], (0, 0, 0.15), (0, 0, 0), "Z", ["torso" + ending]
    for side, sign in (("left", 1), ("right", -1)):
        for parent, parts, (x, y, z), step, axes in table:
            names = [f"{side}_{part}" for part in parts.split()]
            links, joints = [name + "_link" for name in names], [name + ending for name in names]
            yield parent.replace("left", side), links, (x, sign * y, z), step, axes, joints


def allegro():
    """Fingers beneath the cube, which reach along Z."""
    for finger, x in (("index", -0.045), ("middle", -0.015), ("ring", 0.015), ("thumb", 0.045)):
        links, joints = ([f"{finger}_{kind}_{i}" for i in range(4)] for kind in ("link", "joint"))
        yield "palm_link", links, (x, -x, 0.08), (0, 0, 0.04), "XYYY", joints


def shadow():
    """A palm beneath the cube and fingers along X, whose joints are numbered from the tip."""
    yield "rh_forearm", ["rh_wrist", "rh_palm"], (0.3, 0, 0), (0.09, 0, 0), "ZX", ["rh_WRJ2", "rh_WRJ1"]
    for i, (finger, parts) in enumerate(SHADOW.items()):
        links = [f"rh_{finger}{part}" for part in parts.split()]
        joints = [f"rh_{finger.upper()}J{j}" for j in range(len(links), 0, -1)]
        yield "rh_palm", links, (0.08, 0.03 * i - 0.06, 0), (0.03, 0, 0), "ZYYYY"[:len(links)], joints


def prim(kind, name, *content, apis=""):
    """A node of a scene in USD's text format, from its attributes and the nodes in it."""
    schemas = f"(prepend apiSchemas = {json.dumps(apis.split())})" if apis else ""
    return "\n".join([f'def {kind} "{name}" {schemas}', "{", *content, "}"])


def transform(kind, operation, value):
    return f"{kind} xformOp:{operation} = {value}\nuniform token[] xformOpOrder = [\"xformOp:{operation}\"]"


def body(link, position):
    sides, mass = next((BOXES[part] for part in BOXES if part in link), OTHER)
    touches = "" if (sides, mass) == OTHER else "PhysicsCollisionAPI"
    return prim("Xform", link, transform("double3", "translate", position), f"float physics:mass = {mass}",
                f"float3 physics:diagonalInertia = {3 * (max(0.01 * mass, 0.001),)}",
                prim("Cube", "box", transform("float3", "scale", sides), apis=touches),
                apis="PhysicsRigidBodyAPI PhysicsMassAPI")


def hinge(joint, axis, parent, link, offset, limits):
    return prim("PhysicsRevoluteJoint", joint, f"rel physics:body0 = </asset/{parent}>", f"rel physics:body1 = </asset/{link}>",
                f'uniform token physics:axis = "{axis}"', f"point3f physics:localPos0 = {offset}",
                f"float physics:lowerLimit = {limits[0]}", f"float physics:upperLimit = {limits[1]}",
                apis="PhysicsDriveAPI:angular")


def tendon(name, *joints):
    """As long as the sum of its joints' angles; a motor holds it at a length."""
    path = ", ".join(f"</asset/{joint}>" for joint in joints)
    return [prim("MjcTendon", name, 'uniform token mjc:type = "fixed"', f"rel mjc:path = [{path}]"),
            prim("MjcActuator", f"{name}_motor", f"rel mjc:target = </asset/{name}>", 'uniform token mjc:biasType = "affine"',
                 "uniform double[] mjc:biasPrm = [0, -1, 0, 0, 0, 0, 0, 0, 0, 0]")]


def robot(base, chains, hand=False):
    """A humanoid, or a hand whose base is fixed and whose fingers bend about Y."""
    positions, content = {base: (0, 0, 0)}, [body(base, (0, 0, 0))]
    if hand:
        content.append(prim("PhysicsFixedJoint", "fixed", f"rel physics:body1 = </asset/{base}>"))
    for parent, links, offset, step, axes, joints in chains:
        for link, axis, joint in zip(links, axes, joints, strict=True):
            positions[link] = tuple(x + dx for x, dx in zip(positions[parent], offset, strict=True))
            limits = (-120, 120) if not hand else (0, 90) if axis == "Y" else (-20, 20)
            content += [body(link, positions[link]), hinge(joint, axis, parent, link, offset, limits)]
            parent, offset = link, step
    return content


def write(path, content, apis):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = '#usda 1.0\n(\ndefaultPrim = "asset"\nmetersPerUnit = 1\nupAxis = "Z"\n)\n'
    path.write_text(header + prim("Xform", "asset", *content, apis=apis) + "\n")


def main(root):
    plane = prim("Plane", "plane", 'uniform token axis = "Z"', apis="PhysicsCollisionAPI")
    write(root / "IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda", [plane], "")
    cube = ["float physics:mass = 0.2", prim("Cube", "box", "double size = 0.06", apis="PhysicsCollisionAPI")]
    write(root / "Props/Blocks/DexCube/dex_cube_instanceable.usd", cube, "PhysicsRigidBodyAPI PhysicsMassAPI")
    tendons = [x for finger in ("FF", "MF", "RF", "LF") for x in tendon(f"rh_{finger}J0", f"rh_{finger}J2", f"rh_{finger}J1")]
    for path, content in {
            "IsaacLab/Robots/Unitree/G1/g1_minimal.usd": robot("pelvis", humanoid(G1, "_joint")),
            "IsaacLab/Robots/Unitree/H1/h1_minimal.usd": robot("pelvis", humanoid(H1, "")),
            "Robots/WonikRobotics/AllegroHand/allegro_hand_instanceable.usd": robot("palm_link", allegro(), hand=True),
            "Robots_Multiphysics/ShadowRobot/ShadowHandMultiPhysics_v0/right_hand/right_hand.usda":
                robot("rh_forearm", shadow(), hand=True) + tendons}.items():
        write(root / path, content, "PhysicsArticulationRootAPI")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) / "Isaac")

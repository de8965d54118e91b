export const title = "Dead letters";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}

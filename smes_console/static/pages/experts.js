export const title = "Experts";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}
